"""`dad-fast ablate --dry-run`: the cells of a sweep, what they share, what is done, and what the rest will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dad_fast.config import Config, to_toml
from dad_fast.config.ablation import Plan, identity
from dad_fast.config.fields import with_values
from dad_fast.config.launch import Launch
from dad_fast.config.stores import SharedStore, online
from dad_fast.engine.signals import stop_requests
from dad_fast.errors import DadFastError
from dad_fast.observe.progress import format_seconds
from dad_fast.sweep.pool import Job, Pool
from dad_fast.sweep.runs import Run, Sweep
from dad_fast.sweep.sweep import job_devices, store_message

# Settings that change a result but not the time of a step. The filter costs aug-only a pass of the teacher.
_FREE = (
    *("attack.eps", "attack.step_size", "attack.norm", "attack.random_start", "augment.smoothing", "ema.decay", "ema.warmup"),
    *("loss.ce", "loss.kd", "loss.dad", "loss.dat", "loss.aug", "loss.temperature", "store.dirs"),
    *("lp_clip.labels", "lp_clip.weight", "lp_clip.threshold", "lp_clip.init"),
    *("optim.lr", "optim.weight_decay", "optim.momentum", "data.class_map", "student.drop_path", "student.drop"),
)


@dataclass(frozen=True)
class Cost:
    """Seconds on one process like the one that measured."""

    runs: dict[str, float]  # cell -> one run of it, evaluation included
    stores: dict[str, float]  # folder -> filling it
    store_bytes: int
    reference: tuple[str, float]  # a plain KD run of the base's length, or the base where there can be none
    teachers: float  # evaluating teachers, once in a sweep
    threads: int
    num_forms: int


def print_plan(sweep: Sweep, launch: Launch) -> int:
    plan, config = sweep.ablation, sweep.config
    assert plan is not None
    devices = job_devices(sweep, launch)
    cost = _cost(sweep, plan, devices)
    done = {run.name for run in sweep.runs if run.record() is not None}
    width, indent = max(map(len, config.variants)) + 7, max(map(len, plan.axes)) + 2
    print(f"{'':<{indent}}{'cell':<{width}}{'seeds':>6}{'done':>6}{'s a run':>9}{f'× {cost.reference[0]}':>12}")
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
    print(f"\n{len(sweep.config.variants)} cells, {num_runs} runs; {num_runs - len(left)} are done, {len(left)} to do")
    for store in sweep.stores:
        users = sum(store.folder in run.cfg.store.dirs for run in sweep.runs)
        print(f"{users} runs learn from {store.folder}, filled once in {format_seconds(cost.stores[store.folder])}")
    if sweep.stores:
        size = f"{cost.store_bytes / 1e6:,.1f} MB in all"
        print(f"stores: {size}; their images are not augmented, and one draw serves all seeds")
    needed = {folder for run in left for folder in run.cfg.store.dirs}
    total = sum(cost.runs[run.variant] for run in left) + sum(cost.stores[folder] for folder in needed)
    total += cost.teachers if left else 0
    several = f", {format_seconds(total / len(devices))} on {len(devices)}" if len(devices) > 1 else ""
    name, seconds = cost.reference
    times = f"{total / seconds:.1f} times one run of {name} ({seconds:.0f} s)"
    print(f"cost: {format_seconds(total)} on one process like this one{several}; {times}")
    threads = f"{cost.threads} thread{'s' if cost.threads > 1 else ''}"
    print(
        f"Based on a few steps of each of {cost.num_forms} forms of step and a batch of every suite, on {devices[0]} "
        f"with {threads}; start-up and checkpoints are not counted."
    )


def _cost(sweep: Sweep, plan: Plan, devices: Sequence[str]) -> Cost:
    cells = {run.variant: run.cfg for run in sweep.runs}
    base = cells[plan.base]
    can_distil = bool(base.student.name and base.teacher.name)
    reference = online(with_values(base, {"method": "kd"})) if can_distil else base
    kinds = {
        store.folder: "codes" if store.launch.images == "none" and store.kind == "adversarial" else store.kind
        for store in sweep.stores
    }
    stored = {name: [kinds[folder] for folder in cfg.store.dirs] for name, cfg in cells.items()}
    forms = {name: _form(cfg, stored[name]) for name, cfg in cells.items()} | {"": _form(reference, [])}
    first = {form: name for name, form in reversed(forms.items())}
    store_forms = {store.folder: _store_form(store) for store in sweep.stores}
    first_store = {form: folder for folder, form in reversed(store_forms.items())}

    def message(device: str) -> dict[str, Any]:
        chosen = {name: (cells | {"": reference})[name] for name in first.values()}
        return {
            "do": "measure",
            "runs": {name: to_toml(with_values(cfg, {"device": device})) for name, cfg in chosen.items()},
            "stored": stored,
            "stores": [store_message(s, device) for s in sweep.stores if s.folder in first_store.values()],
        }

    answers: list[dict[str, Any]] = []
    with stop_requests() as stop, Pool(devices[:1], logs=None, threads_for=len(devices)) as pool:
        pool.run([Job("measure", message)], lambda job, answer, seconds: answers.append(answer), stop)
        if stop.error:
            raise stop.error("nothing was written")
    if "error" in answers[0]:
        raise DadFastError(f"nothing could be measured: {answers[0]['error']}")
    steps, evaluation, fills = answers[0]["steps"], answers[0]["evaluation"], answers[0]["fills"]

    def seconds(name: str, cfg: Config) -> float:
        found = steps[first[forms[name]]]
        epochs = cfg.schedule.epochs + cfg.schedule.cooldown_epochs
        count = round(epochs * found["steps_per_epoch"])
        count = min(count, cfg.max_steps) if cfg.max_steps else count
        every = cfg.eval.every_epochs
        validations = 1 + (int(count / found["steps_per_epoch"]) // every if every else 0)
        evaluating = validations * evaluation["val"] + evaluation["suites"]
        return float(found["preparing"] + count * found["seconds"] + evaluating)

    return Cost(
        runs={name: seconds(name, cfg) for name, cfg in cells.items()},
        stores={folder: fills[first_store[form]]["seconds"] for folder, form in store_forms.items()},
        store_bytes=sum(fills[first_store[form]]["bytes"] for form in store_forms.values()),
        reference=("KD" if can_distil else plan.base, seconds("", reference)),
        teachers=evaluation["teacher"] * len({repr(cfg.teacher) for cfg in cells.values()}),
        threads=answers[0]["threads"],
        num_forms=len(first),
    )


def _form(cfg: Config, stored: Sequence[str]) -> str:
    """Equal for runs whose steps take equally long."""
    free = (*_FREE, *(() if cfg.method == "aug-only" else ("loss.filter",)))
    parts = [pair for pair in identity(cfg) if pair[0] not in free and not pair[0].startswith("schedule.")]
    return repr((parts, list(stored)))


def _store_form(store: SharedStore) -> str:
    cfg = store.config if store.kind == "adversarial" else with_values(store.config, {"method": "kd"})
    return repr((_form(cfg, []), asdict(store.launch) | {"output": ""}))
