"""`dad-fast ablate --dry-run`: which cells there are, what they share, what is done, and what the rest will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dad_fast.commands.ablate_pool import Job, Pool
from dad_fast.config import Config, to_toml
from dad_fast.config.ablation import Plan, SharedStore, identity
from dad_fast.config.fields import with_values
from dad_fast.engine.signals import StopRequest
from dad_fast.errors import DadFastError
from dad_fast.flags.ablate import SweepLaunch
from dad_fast.observe.progress import format_seconds

if TYPE_CHECKING:
    from dad_fast.commands.ablate import Run

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

    runs: dict[str, float]  # cell -> one run of it, judging included
    stores: dict[str, float]  # folder -> filling it
    store_bytes: int
    reference: tuple[str, float]  # a plain KD run of the base's length, or the base where there can be none
    teachers: float  # judging teachers, once in a sweep
    threads: int
    num_forms: int


def print_plan(
    plan: Plan, runs: Sequence[Run], left: Sequence[Run], devices: Sequence[str], launch: SweepLaunch, stop: StopRequest
) -> int:
    cost = _cost(plan, runs, devices, launch, stop)
    if cost is None:
        assert stop.error is not None
        raise stop.error("nothing was written")
    cells = list(plan.config.variants)
    width, indent = max(len(name) for name in cells) + 7, max(map(len, plan.axes)) + 2
    print(f"{'':<{indent}}{'cell':<{width}}{'seeds':>6}{'done':>6}{'s a run':>9}{f'× {cost.reference[0]}':>12}")
    shown = set[str]()
    for axis, names in plan.axes.items():
        for number, name in enumerate(names):
            label = f"{axis if number == 0 else '':<{indent}}"
            if name in shown:
                print(f"{label}{_label(name, plan):<{width}}{'as above':>12}")
                continue
            shown.add(name)
            done = sum(one.cell == name for one in runs) - sum(one.cell == name for one in left)
            seconds = cost.runs[name]
            print(f"{label}{_label(name, plan):<{width}}{plan.config.seeds:>6}{done:>6}{seconds:>9.0f}{seconds / cost.reference[1]:>12.1f}")
    _print_totals(plan, runs, left, devices, cost)
    return 0


def _label(name: str, plan: Plan) -> str:
    return f"{name} (base)" if name == plan.base else name


def _print_totals(plan: Plan, runs: Sequence[Run], left: Sequence[Run], devices: Sequence[str], cost: Cost) -> None:
    print(f"\n{len(plan.config.variants)} cells, {len(runs)} runs; {len(runs) - len(left)} are done, {len(left)} to do")
    for store in plan.stores:
        users = sum(store.folder in one.cfg.store.dirs for one in runs)
        print(f"{users} runs learn from {store.folder}, filled once in {format_seconds(cost.stores[store.folder])}")
    if plan.stores:
        print(f"stores: {cost.store_bytes / 1e6:,.1f} MB in all; their images are not augmented, and one draw serves all seeds")
    needed = {folder for one in left for folder in one.cfg.store.dirs}
    total = sum(cost.runs[one.cell] for one in left) + sum(cost.stores[folder] for folder in needed) + (cost.teachers if left else 0)
    several = f", {format_seconds(total / len(devices))} on {len(devices)}" if len(devices) > 1 else ""
    times = f"{total / cost.reference[1]:.1f} times one run of {cost.reference[0]} ({cost.reference[1]:.0f} s)"
    print(f"cost: {format_seconds(total)} on one process like this one{several}; {times}")
    print(
        f"Based on a few steps of each of {cost.num_forms} forms of step and a batch of every suite, on {devices[0]} with "
        f"{cost.threads} thread{'s' if cost.threads > 1 else ''}; start-up and checkpoints are not counted."
    )


def _cost(plan: Plan, runs: Sequence[Run], devices: Sequence[str], launch: SweepLaunch, stop: StopRequest) -> Cost | None:
    cells = {one.cell: one.cfg for one in runs}
    base = cells[plan.base]
    can_distil = bool(base.student.name and base.teacher.name)
    reference = with_values(base, {"method": "kd", "store.dirs": (), "loss.form": "paper"}) if can_distil else base
    decoded = launch.store_images == "none"
    kinds = {store.folder: "codes" if decoded and store.kind == "adversarial" else store.kind for store in plan.stores}
    stored = {name: [kinds[folder] for folder in cfg.store.dirs] for name, cfg in cells.items()}
    forms = {name: _form(cfg, stored[name]) for name, cfg in cells.items()} | {"": _form(reference, [])}
    first = {form: name for name, form in reversed(forms.items())}
    store_forms = {store.folder: _store_form(store) for store in plan.stores}
    first_store = {form: folder for folder, form in reversed(store_forms.items())}

    def message(device: str) -> dict[str, Any]:
        chosen = {name: (cells | {"": reference})[name] for name in first.values()}
        return {
            "do": "measure", "runs": {name: _toml(cfg, device) for name, cfg in chosen.items()}, "stored": stored,
            "stores": {s.folder: {"config": _toml(s.config, device), "launch": asdict(s.launch)}
                       for s in plan.stores if s.folder in first_store.values()},
        }  # fmt: skip

    answers: list[dict[str, Any]] = []
    with Pool(devices[:1], logs=None, threads_for=len(devices)) as pool:
        pool.run([Job("measure", message)], lambda job, answer, seconds: answers.append(answer), stop)
    if stop.error or not answers:
        return None
    if "error" in answers[0]:
        raise DadFastError(f"nothing could be measured: {answers[0]['error']}")
    steps, judging, fills = answers[0]["steps"], answers[0]["judging"], answers[0]["fills"]

    def seconds(name: str, cfg: Config) -> float:
        found = steps[first[forms[name]]]
        epochs = cfg.schedule.epochs + cfg.schedule.cooldown_epochs
        count = round(epochs * found["steps_per_epoch"])
        count = min(count, cfg.max_steps) if cfg.max_steps else count
        every = cfg.eval.every_epochs
        validations = 1 + (int(count / found["steps_per_epoch"]) // every if every else 0)
        return float(found["preparing"] + count * found["seconds"] + validations * judging["val"] + judging["suites"])

    return Cost(
        runs={name: seconds(name, cfg) for name, cfg in cells.items()},
        stores={folder: fills[first_store[form]]["seconds"] for folder, form in store_forms.items()},
        store_bytes=sum(fills[first_store[form]]["bytes"] for form in store_forms.values()),
        reference=("KD" if can_distil else plan.base, seconds("", reference)),
        teachers=judging["teacher"] * len({repr(cfg.teacher) for cfg in cells.values()}),
        threads=answers[0]["threads"],
        num_forms=len(first),
    )


def _form(cfg: Config, stored: Sequence[str]) -> str:
    """Equal for runs whose steps take as long."""
    free = (*_FREE, *(() if cfg.method == "aug-only" else ("loss.filter",)))
    parts = [pair for pair in identity(cfg) if pair[0] not in free and not pair[0].startswith("schedule.")]
    return repr((parts, list(stored)))


def _store_form(store: SharedStore) -> str:
    form = _form(store.config, []) if store.kind == "adversarial" else _form(with_values(store.config, {"method": "kd"}), [])
    return repr((form, asdict(store.launch) | {"output": ""}))


def _toml(cfg: Config, device: str) -> str:
    return to_toml(with_values(cfg, {"device": device}))


