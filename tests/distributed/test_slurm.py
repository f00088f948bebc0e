"""The Slurm script with stand-ins for Slurm's commands: the job it starts, and requeueing."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.processes import HANG, wait_until

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/slurm.sh"
TOOLS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> "$SAID"; fi',
    # Two tasks, one after the other, as Slurm numbers them; the exit code of a step is its tasks' highest.
    "srun": """while [ "$1" != bash ]; do shift; done
worst=0
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 "$@"
  code=$?
  [ $code -gt $worst ] && worst=$code
done
exit $worst""",
    "squeue": "echo $STATE",
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$SAID"; exit $CODE',
}


SIGNALLED = """trap 'echo passed on >> "$SAID"; exit 75' USR1
echo started >> "$SAID"
while :; do sleep 0.05; done"""


def environment(folder, code=0, state="RUNNING", **tools):
    for name, text in (TOOLS | tools).items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SAID": str(folder / "said"),
        "CODE": str(code),
        "STATE": state,
    }
    return env | {"SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[7-8]"}


@pytest.mark.parametrize(
    "code, state, requeued",
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
    ],
)
def test_preempted_job_is_requeued_unless_cancelled(tmp_path, code, state, requeued):
    env = environment(tmp_path, code, state)
    done = subprocess.run(
        ["bash", str(SCRIPT), "--preset", "demo", "-o", "runs/a b"], env=env, timeout=HANG
    )
    assert done.returncode == code
    said = (tmp_path / "said").read_text().splitlines()
    assert said[:2] == [
        f"{r} {r} 2 2 node7 20123 -m dad_fast train --resume auto --preset demo -o runs/a b"
        for r in (0, 1)
    ]
    assert said[2:] == (["requeue 40123"] if requeued else [])


def traps(pid, number):
    """Return whether a process has a handler for a signal."""
    (caught,) = [
        line.split()[1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigCgt:")
    ]
    return int(caught, 16) >> (number - 1) & 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_script_is_forwarded(tmp_path, number):
    env, said = environment(tmp_path, srun=SIGNALLED), tmp_path / "said"
    job = subprocess.Popen(["bash", str(SCRIPT)], env=env)
    wait_until(said.exists)
    wait_until(lambda: traps(job.pid, number))
    job.send_signal(number)
    assert job.wait(HANG) == 75
    assert said.read_text().splitlines() == ["started", "passed on", "requeue 40123"]
