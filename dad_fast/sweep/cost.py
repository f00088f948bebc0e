"""`dad-fast ablate --dry-run`: the cells of a sweep, their stores, and the cost of what is left."""

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
from dad_fast.sweep.sweep import job_devices, job_groups, store_message


@dataclass(frozen=True)
class Cost:
    """Seconds on one process like the one that measured.

    runs: cell -> one run of it, evaluation included
    shared: cell -> the part of it in which batches are made
    stores: folder -> filling it
    reference: name and seconds of a plain KD run as long as the base, or of the base if KD is
        impossible
    teacher: evaluating a teacher, once in a sweep
    """

    runs: dict[str, float]
    shared: dict[str, float]
    stores: dict[str, float]
    store_bytes: int
    reference: tuple[str, float]
    teacher: float
    threads: int


def print_plan(sweep: Sweep, launch: Launch) -> int:
    """Measure the sweep, print its cells and cost, and return the exit code."""
    plan, config = sweep.ablation, sweep.config
    assert plan is not None
    devices = job_devices(sweep, launch)
    cost = _cost(sweep, plan, devices)
    done = {run.name for run in sweep.runs if run.record() is not None}
    width, indent = max(map(len, config.variants)) + 7, max(map(len, plan.axes)) + 2
    columns = f"{'seeds':>6}{'done':>6}{'s/run':>9}{f'× {cost.reference[0]}':>12}"
    print(f"{'':<{indent}}{'cell':<{width}}{columns}")
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
            digits = 0 if seconds >= 10 else 1
            print(f"{row}{config.seeds:>6}{num_done:>6}{seconds:>9.{digits}f}{ratio:>12.1f}")
    left = [run for run in sweep.runs if run.name not in done]
    _print_totals(sweep, left, job_groups(sweep, left, launch, devices), devices, cost)
    return 0


def _print_totals(
    sweep: Sweep,
    left: Sequence[Run],
    groups: Sequence[Sequence[Run]],
    devices: Sequence[str],
    cost: Cost,
) -> None:
    num_cells, num_runs = len(sweep.config.variants), len(sweep.runs)
    done = f"{num_runs - len(left)} are done, {len(left)} to do"
    print(f"\n{num_cells} cells, {num_runs} runs; {done}")
    for store in sweep.stores:
        users = sum(store.folder in run.cfg.store.dirs for run in sweep.runs)
        filling = format_seconds(cost.stores[store.folder])
        print(f"{users} runs learn from {store.folder}, filled once in {filling}")
    if sweep.stores:
        size = f"{cost.store_bytes / 1e6:,.1f} MB in all"
        print(f"stores: {size}; their images are not augmented, and one draw serves all seeds")

    shared = [group for group in groups if len(group) > 1]
    saved = sum((len(group) - 1) * cost.shared[group[0].variant] for group in shared)
    if shared:
        several = f"{len(shared)} groups" if len(shared) > 1 else "one group"
        print(
            f"{sum(map(len, shared))} runs learn in {several} from the same batches: "
            f"saves {format_seconds(saved)}"
        )

    folders = {folder for run in left for folder in run.cfg.store.dirs}
    total = sum(cost.runs[run.variant] for run in left) - saved
    total += sum(cost.stores[folder] for folder in folders)
    total += cost.teacher * len({repr(run.cfg.teacher) for run in left})
    several = ""
    if len(devices) > 1:
        several = f", {format_seconds(total / len(devices))} on {len(devices)} of them"
    name, seconds = cost.reference
    times = f"{total / seconds:.1f} times one run of {name} ({seconds:.0f} s)"
    print(f"time: {format_seconds(total)} on one process like this one{several};\n{times}")

    threads = f"{cost.threads} thread{'s' if cost.threads > 1 else ''}"
    print(
        f"Measured by a few steps of each cell and a batch of every suite, on {devices[0]} with\n"
        f"{threads}; start-up and checkpoints are not counted."
    )


def _cost(sweep: Sweep, plan: Plan, devices: Sequence[str]) -> Cost:
    cells = {run.variant: run.cfg for run in sweep.runs}
    base = cells[plan.base]
    can_distil = bool(base.student.name and base.teacher.name)
    reference = online(with_values(base, {"method": "kd"})) if can_distil else base
    kinds = {}
    for store in sweep.stores:
        only_codes = store.kind == "adversarial" and store.launch.images == "none"
        kinds[store.folder] = "codes" if only_codes else store.kind

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
            raise stop.error("stopped by a signal while measuring; nothing was written")
    found = answers[0]
    if "error" in found:
        raise DadFastError(f"nothing could be measured: {found['error']}")
    seconds = found["runs"]
    return Cost(
        runs=seconds,
        shared=found["shared"],
        stores={folder: fill["seconds"] for folder, fill in found["stores"].items()},
        store_bytes=sum(fill["bytes"] for fill in found["stores"].values()),
        reference=("KD" if can_distil else plan.base, seconds.pop("")),
        teacher=found["teacher"],
        threads=found["threads"],
    )
