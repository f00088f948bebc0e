"""`dad-fast train --dry-run`: estimate a run, or every variant of a comparison, and print it."""

from __future__ import annotations

import os

from dad_fast.config import Config, Launch, expand
from dad_fast.distributed.launch import is_worker, processes_of_run
from dad_fast.tools.dry_run.estimate import estimate
from dad_fast.tools.dry_run.rates import read_rates
from dad_fast.tools.dry_run.show import show, show_several


def run(cfg: Config, launch: Launch) -> int:
    """Print what the runs of `cfg` need and return the exit code. Writes nothing."""
    if is_worker() and os.environ["RANK"] != "0":
        return 0
    num_gpus = processes_of_run(launch.nproc)
    table = read_rates()
    variants: dict[str, Config] = {}
    for name, _, one in expand(cfg):
        variants.setdefault(name, one)
    if len(variants) == 1 and cfg.seeds == 1:
        (one,) = variants.values()
        print(show(estimate(one, num_gpus), table))
        return 0
    found = [(name, cfg.seeds, estimate(one, num_gpus)) for name, one in variants.items()]
    print(show_several(found, table))
    return 0
