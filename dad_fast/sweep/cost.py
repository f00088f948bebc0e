"""`dad-fast ablate --dry-run`: the cells of a sweep, what they share, what is done, and what the rest will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dad_fast.config import to_toml
from dad_fast.config.fields import with_values
from dad_fast.config.options import Launch
from dad_fast.distributed.signals import stop_requests
from dad_fast.errors import DadFastError
from dad_fast.loggers.progress import JobsProgress, format_seconds
from dad_fast.methods.stores import online
from dad_fast.sweep.ablation import Plan
from dad_fast.sweep.pool import Job, Pool
from dad_fast.sweep.runs import Run, Sweep
from dad_fast.sweep.sweep import job_devices, store_message


@dataclass(frozen=True)
class Cost:
    """Seconds on one process like the one that measured."""

    runs: dict[str, float]  # cell -> one run of it, evaluation included
    stores: dict[str, float]  # folder -> filling it
    store_bytes: int
    reference: tuple[
        str, float
    ]  # a plain KD run of the base's length, or the base where there can be none
    teacher: float  # evaluating a teacher, once in a sweep
    threads: int


def print_plan(sweep: Sweep, launch: Launch) -> int:
    plan, config = sweep.ablation, sweep.config
    assert plan is not None
    devices = job_devices(sweep, launch)
    cost = _cost(sweep, plan, devices)
    done = {run.name for run in sweep.runs if run.record() is not None}
    width, indent = max(map(len, config.variants)) + 7, max(map(len, plan.axes)) + 2
    print(
        f"{'':<{indent}}{'cell':<{width}}{'seeds':>6}{'done':>6}{'s a run':>9}{f'× {cost.reference[0]}':>12}"
    )
    shown = set[str]()
    for axis, names in plan.axes.items():
        for number, name in enumerate(names):
            label = f"{name} (base)" if name == plan.base else name
            row = f"{axis if number == 0 else '':<{indent}}{label:<{width}}"
            if name in shown:
                print(f"{row}{'as above':>12}")
                continue
            shown.add(name)
            num_done = sum(run.variant == name and run.name in done for run in sweep.runs)
            seconds = cost.runs[name]
            ratio = seconds / cost.reference[1]
            print(f"{row}{config.seeds:>6}{num_done:>6}{seconds:>9.0f}{ratio:>12.1f}")
    _print_totals(sweep, [run for run in sweep.runs if run.name not in done], devices, cost)
    return 0


def _print_totals(sweep: Sweep, left: Sequence[Run], devices: Sequence[str], cost: Cost) -> None:
    num_runs = len(sweep.runs)
    print(
        f"\n{len(sweep.config.variants)} cells, {num_runs} runs; {num_runs - len(left)} are done, {len(left)} to do"
    )
    for store in sweep.stores:
        users = sum(store.folder in run.cfg.store.dirs for run in sweep.runs)
        print(
            f"{users} runs learn from {store.folder}, filled once in {format_seconds(cost.stores[store.folder])}"
        )
    if sweep.stores:
        size = f"{cost.store_bytes / 1e6:,.1f} MB in all"
        print(f"stores: {size}; their images are not augmented, and one draw serves all seeds")
    needed = {folder for run in left for folder in run.cfg.store.dirs}
    total = sum(cost.runs[run.variant] for run in left) + sum(
        cost.stores[folder] for folder in needed
    )
    total += cost.teacher * len({repr(run.cfg.teacher) for run in left})
    several = (
        f", {format_seconds(total / len(devices))} on {len(devices)}" if len(devices) > 1 else ""
    )
    name, seconds = cost.reference
    times = f"{total / seconds:.1f} times one run of {name} ({seconds:.0f} s)"
    print(f"cost: {format_seconds(total)} on one process like this one{several}; {times}")
    threads = f"{cost.threads} thread{'s' if cost.threads > 1 else ''}"
    print(
        f"Based on a few steps of each cell and a batch of every suite, on {devices[0]} with {threads}; "
        "start-up and checkpoints are not counted."
    )


def _cost(sweep: Sweep, plan: Plan, devices: Sequence[str]) -> Cost:
    cells = {run.variant: run.cfg for run in sweep.runs}
    base = cells[plan.base]
    can_distil = bool(base.student.name and base.teacher.name)
    reference = online(with_values(base, {"method": "kd"})) if can_distil else base
    kinds = {
        store.folder: "codes"
        if store.launch.images == "none" and store.kind == "adversarial"
        else store.kind
        for store in sweep.stores
    }

    def message(device: str) -> dict[str, Any]:
        measured = {**cells, "": reference}
        return {
            "do": "measure",
            "runs": {
                name: to_toml(with_values(cfg, {"device": device}))
                for name, cfg in measured.items()
            },
            "stored": {
                name: [kinds[folder] for folder in cfg.store.dirs] for name, cfg in cells.items()
            },
            "stores": [store_message(store, device) for store in sweep.stores],
        }

    answers: list[dict[str, Any]] = []
    with stop_requests() as stop, JobsProgress() as progress:
        with Pool(devices[:1], logs=None, threads_for=len(devices)) as pool:
            pool.run(
                [Job("measure", message)],
                lambda _, answer, __: answers.append(answer),
                stop,
                progress.update,
            )
        if stop.error:
            raise stop.error("nothing was written")
    found = answers[0]
    if "error" in found:
        raise DadFastError(f"nothing could be measured: {found['error']}")
    seconds = found["runs"]
    return Cost(
        runs=seconds,
        stores={folder: fill["seconds"] for folder, fill in found["stores"].items()},
        store_bytes=sum(fill["bytes"] for fill in found["stores"].values()),
        reference=("KD" if can_distil else plan.base, seconds.pop("")),
        teacher=found["teacher"],
        threads=found["threads"],
    )
