"""`dad-fast train --dry-run`: estimate a run, or every variant of a comparison, and print it."""

from __future__ import annotations

import os

from dad_fast.config import Config, Launch, expand
from dad_fast.distributed.launch import is_worker, processes_of_run
from dad_fast.methods.batches import batch_settings
from dad_fast.tools.dry_run.estimate import Estimate, estimate
from dad_fast.tools.dry_run.rates import read_rates
from dad_fast.tools.dry_run.show import show, show_several


def run(cfg: Config, launch: Launch) -> int:
    """Print what the runs of `cfg` need and return the exit code. Writes nothing."""
    if is_worker() and os.environ["RANK"] != "0":
        return 0
    num_gpus = processes_of_run(launch.nproc)
    table = read_rates()
    runs = {name: one for name, seed, one in expand(cfg) if seed == cfg.seed}
    if len(runs) == 1 and cfg.seeds == 1:
        (one,) = runs.values()
        print(show(estimate(one, num_gpus), table))
        return 0
    groups: dict[str, dict[str, Estimate]] = {}
    for name, one in runs.items():
        key = repr(batch_settings(one, any_size=bool(cfg.students)))
        groups.setdefault(key, {})[name] = estimate(one, num_gpus)
    print(show_several(list(groups.values()), cfg.seeds, table))
    return 0
