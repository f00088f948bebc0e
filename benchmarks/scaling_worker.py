"""A process of the group `scaling`: does what it is told on stdin, one line at a time, and answers "done" when the device has done it.

step METHOD         one training step on its own batch, all-reduce included where it was started with others
ddp METHOD          the same with torch's DistributedDataParallel (ddp.py)
reduce NUM          an all-reduce of NUM float32

python -m benchmarks.scaling_worker SIZE DEVICE BATCH_SIZE
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from benchmarks.ddp import with_ddp
from benchmarks.workload import make_workload
from dad_fast.config.schema import Config
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.device import resolve_device


def main(size: str, device_name: str, batch_size: str) -> None:
    torch.set_num_threads(1)
    distributed.init(Config(device=device_name))
    device = resolve_device(device_name)
    work = make_workload(size, device, int(batch_size))
    made: dict[str, Callable[[], object]] = {}

    def function(line: str) -> Callable[[], object]:
        verb, what = line.split()
        if verb in ("step", "ddp"):
            cfg = work.with_method(what)
            step = work.step(cfg) if verb == "step" else with_ddp(work.step(cfg))
            return lambda: step(work.batch, 10, cfg.optim.lr)
        tensor = torch.zeros(int(what), device=device)
        return lambda: distributed.all_reduce_sums(tensor)

    numbers = sum(p.numel() for p in work.student().parameters())
    print(numbers, flush=True)
    for line in sys.stdin:
        if line not in made:
            made[line] = function(line)
        made[line]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print("done", flush=True)
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
