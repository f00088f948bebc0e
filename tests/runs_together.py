"""Train runs alone and in lockstep, in one of several processes over gloo.

python runs_together.py INPUTS OUTPUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from dad_fast.distributed import process_group as distributed
from tests.engine.test_lockstep import alone, pair, run


def main() -> None:
    inputs, output = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    cfgs = pair(inputs, "dat+dad, accumulated", "data.batch_size=2", "checkpoint.keep=100")
    distributed.init(cfgs[0])
    alone(cfgs, output / "alone")
    run(cfgs, output / "together")
    distributed.barrier()
    distributed.close()
    # Skips the unloading of modules, which takes long.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
