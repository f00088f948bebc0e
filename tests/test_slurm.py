"""The Slurm script, run by bash with stand-ins for Slurm's own commands: what it starts, and when it queues the job again."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/slurm.sh"
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
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$SAID"; exit $CODE',
}


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (75, True)])
def test_the_job_is_queued_again_where_it_was_stopped_and_saved(tmp_path, code, requeued):
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(tmp_path / "said"), "CODE": str(code)}
    env |= {"SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[7-8]"}
    done = subprocess.run(["bash", str(SCRIPT), "--preset", "demo", "-o", "runs/a b"], env=env, timeout=60)
    assert done.returncode == code
    said = (tmp_path / "said").read_text().splitlines()
    assert said[:2] == [f"{r} {r} 2 2 node7 20123 -m dad_fast train --resume auto --preset demo -o runs/a b" for r in (0, 1)]
    assert said[2:] == (["requeue 40123"] if requeued else [])
