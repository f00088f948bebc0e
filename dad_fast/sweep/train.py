"""`dad-fast train`: one run, or every variant and seed of a comparison."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from dad_fast.config import Config, Launch
from dad_fast.distributed.launch import (
    end_with_launcher,
    is_worker,
    number_of_processes,
    processes_of_run,
    run_processes,
    started_here,
)
from dad_fast.errors import UsageError
from dad_fast.locks import lock_folder
from dad_fast.sweep.groups import groups
from dad_fast.sweep.runs import Sweep, check_paths, make_sweep


def run(cfg: Config, launch: Launch) -> int:
    """Train and return the exit code.

    Layout: OUT itself for one run; OUT/VARIANT/seed-S/ and a table in OUT for several, with the
    student's name for VARIANT where several learn from the same batches.
    """
    sweep = make_sweep(
        cfg, Path(launch.output), num_processes=lambda: processes_of_run(launch.nproc)
    )
    if is_worker():
        if launch.nproc != "1" and not started_here():
            raise UsageError("--nproc: torchrun starts the processes; leave it out")
        end_with_launcher()
    else:
        # Before torch is imported and before other processes start.
        check_paths(sweep, launch)
        if (nproc := number_of_processes(launch.nproc)) > 1:
            if launch.jobs > 1:
                raise UsageError(
                    f"--jobs {launch.jobs}: with --nproc {nproc} one run at a time has all "
                    "processes; leave one out"
                )
            return run_processes(nproc, "train", launch.arguments)
        # Students that all learn from the same batches train here, with their own progress bar.
        one_group = bool(cfg.students) and len(groups(sweep, sweep.runs)) == 1
        if len(sweep.runs) > 1 and not one_group:
            from dad_fast.sweep.sweep import run_sweep

            return run_sweep(sweep, launch)
    return _train_in_this_process(sweep, cfg, launch)


def run_in_this_process(cfg: Config, launch: Launch) -> None:
    """Train every run of the settings in this process, or with the others that torchrun started."""
    sweep = make_sweep(cfg, Path(launch.output), num_processes=lambda: processes_of_run("1"))
    if is_worker():
        end_with_launcher()
    else:
        check_paths(sweep, launch)
    _train_in_this_process(sweep, cfg, launch)


def _train_in_this_process(sweep: Sweep, cfg: Config, launch: Launch) -> int:
    # Before torch is imported. Of several processes the first one locks, when they have joined.
    with nullcontext() if is_worker() else lock_folder(sweep.output):
        from dad_fast.distributed import process_group as distributed
        from dad_fast.sweep.run import run_here

        with distributed.joined(cfg):
            return run_here(sweep, launch)
