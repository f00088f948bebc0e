#!/bin/bash
# Train on the GPUs of several machines under Slurm, one task a GPU. All arguments go to dad-fast train:
#   sbatch --nodes 2 scripts/slurm.sh --preset dad-vitb16 --data-dir /data/imagenet --discretizer vqgan.ckpt \
#       --teacher open_clip:ViT-L-14-quickgelu@vitl14.safetensors -o runs/dad
# Two minutes before the time limit and on preemption the run saves a checkpoint and exits with 75; the
# job is then requeued and resumes. The output folder must outlive the job. Adapt the numbers below.
# Tested under Slurm 22.05.8 on two nodes (two slurmd of one machine) with a CPU task each: time limit,
# preemption, scancel with and without --signal and --batch, a failing run. Not yet run with GPUs.
#SBATCH --job-name=dad-fast
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# No --kill-on-bad-exit: if a process dies, the others notice, name it and exit.
srun --kill-on-bad-exit=0 --wait=120 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python -m dad_fast train --resume auto "$@"' dad-fast "$@" &
srun=$!
# Forward a signal that only this script gets, as after scancel --batch.
trap 'kill -USR1 "$srun" 2> /dev/null' TERM USR1
while kill -0 "$srun" 2> /dev/null; do
  wait "$srun"
done
wait "$srun"
code=$?

# A cancelled job is no longer running and stays cancelled.
if [ "$code" -eq 75 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
