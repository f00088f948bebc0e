"""Cost of a run: throughput, energy from the GPU's power samples, and time relative to KD.

KD is plain distillation, a run of the same comparison.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dad_fast.methods.registry import BASELINE
from dad_fast.report.markup import numbers, table
from dad_fast.report.run_files import Run, machine, number
from dad_fast.report.runs import Group

# Two runs' speeds are compared only if these settings are equal.
SAME_WORK = (
    "student.name",
    "student.model_kwargs",
    "augment.img_size",
    "data.batch_size",
    "data.global_batch_size",
    "data.data_dir",
    "precision",
    "engine.savings",
)

COLUMNS = (
    "steps",
    "training time, s",
    "stores, s",
    "stores' share, %",
    "img/s",
    "time per image / KD",
    "data wait, %",
    "GPU memory, GiB",
    "power, W",
    "energy, J per image",
    "energy, Wh",
    "bad images",
)


def throughput(run: Run) -> float | None:
    """Return clean images a second over all logged windows, weighted by their images.

    Evaluation is not counted.
    """
    windows = _windows(run)
    # In units of a step's images.
    seconds = sum(steps / rate for steps, rate, _ in windows)
    return sum(steps for steps, _, _ in windows) / seconds if seconds else None


def joules_per_image(run: Run) -> float | None:
    """Return the energy of the GPUs per clean image; None without power samples.

    A window's energy is its seconds times the power averaged over its two ends. Training alone is
    counted, neither evaluation nor the host. With several processes the power of the first one's
    GPU is used for all. Runs that share their batches count an equal part each.
    """
    energy, steps_seen, before = 0.0, 0.0, None
    for steps, rate, power in _windows(run):
        if power is not None:
            energy += steps * (power + (power if before is None else before)) / 2 / rate
            steps_seen += steps
        before = power
    return run.processes * energy / steps_seen / run.shared_by if steps_seen else None


def _windows(run: Run) -> list[tuple[float, float, float | None]]:
    """Return per log step: steps since the last one, images a second, power in W."""
    windows, last = [], 0.0
    for row in run.kind("train"):
        step, rate = number(row, "step"), number(row, "img_per_s")
        if step is None or rate is None or rate <= 0:
            continue
        if step > last:
            windows.append((step - last, rate, number(row, "gpu.power_w")))
        last = step
    return windows


def baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """Return the first KD run of the same work and machine, preferably of the same comparison."""
    same = [
        other
        for other in groups
        if other.method == BASELINE
        and not other.setting("store.dirs")
        and _work(other) == _work(group)
    ]
    return min(same, key=lambda other: other.origin != group.origin, default=None)


def _work(group: Group) -> str:
    """Return a key that is equal for groups whose speeds may be compared."""
    settings = {
        path: value
        for run in group.runs[:1]
        for path, value in run.settings.items()
        if any(path == name or path.startswith(f"{name}.") for name in SAME_WORK)
    }
    if not settings:
        # Without a config.toml the run is comparable with no other.
        settings = {"run": str(group.runs[0].folder)}
    machines = sorted(
        {f"{run.processes} x {machine(run.facts)} / {run.shared_by}" for run in group.runs}
    )
    return json.dumps([settings, machines], default=str, sort_keys=True)


def mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def cost_table(groups: Sequence[Group]) -> tuple[str, list[str]]:
    """Return the table, without empty columns, and its notes; ("", []) if nothing was trained."""
    groups = [
        group for group in groups if group.finished or any(run.kind("train") for run in group.runs)
    ]
    if not groups:
        return "", []
    energy = [mean([joules_per_image(run) for run in group.runs]) for group in groups]
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    against: dict[str, None] = {}
    for group, joules in zip(groups, energy, strict=True):
        logged = [row for run in group.runs for row in run.kind("train")]
        speed = mean([throughput(run) for run in group.runs])
        kd = baseline(group, groups)
        kd_speed = mean([throughput(run) for run in kd.runs]) if kd else None
        ratio = kd_speed / speed if speed and kd_speed else None
        if kd and kd is not group and ratio is not None:
            against[kd.label] = None
        images = mean([_images(run) for run in group.runs])
        watt_hours = joules * images / 3600 if joules is not None and images else None
        filled = [number(record, "store_seconds") for record in group.finished]
        stores = [seconds for seconds in filled if seconds]
        speed_form = "{:,.0f}" if speed and speed >= 100 else "{:.1f}"
        values: tuple[tuple[Sequence[float | None], str], ...] = (
            ([_steps(run) for run in group.runs], "{:,.0f}"),
            ([number(record, "seconds") for record in group.finished], "{:,.0f}"),
            (stores, "{:,.0f}"),
            ([_store_share(record) for record in group.finished if any(stores)], "{:.0f}"),
            ([speed], speed_form),
            ([ratio], "{:.2f}×"),
            ([number(row, "data_wait", 100) for row in logged], "{:.1f}"),
            ([number(row, "gpu_memory") for row in logged], "{:.1f}"),
            ([number(row, "gpu.power_w") for row in logged], "{:.0f}"),
            ([joules], "{:.3g}"),
            ([watt_hours], "{:,.3g}"),
            ([number(record, "bad_images") for record in group.finished], "{:g}"),
        )
        for name, (found, form) in zip(COLUMNS, values, strict=True):
            columns[name].append(numbers(found, form.format))
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    body = [
        [group.label, *(cells[i] for cells in shown.values())] for i, group in enumerate(groups)
    ]
    powered = any(joules is not None for joules in energy)
    return table(["", *shown], body), _notes(groups, powered, list(against))


def _steps(run: Run) -> float | None:
    trained = run.kind("train")
    return number(run.record or {}, "steps") or (number(trained[-1], "step") if trained else None)


def _store_share(record: dict[str, Any]) -> float | None:
    """Return the stores' share of the time of stores and training, in percent."""
    stores, seconds = number(record, "store_seconds") or 0.0, number(record, "seconds")
    whole = stores + (seconds or 0.0)
    return 100 * stores / whole if seconds is not None and whole > 0 else None


def _images(run: Run) -> float | None:
    steps, each = _steps(run), run.images_per_step
    return steps * each if steps and each else None


def _notes(groups: Sequence[Group], powered: bool, against: Sequence[str]) -> list[str]:
    facts: list[dict[str, Any]] = [
        run.facts for group in groups for run in group.runs if machine(run.facts)
    ]
    on_cpu = bool(facts) and all(not found["gpus"] for found in facts)
    lines = [
        "Means over seeds. img/s counts clean images; evaluation is left out. "
        "Data wait: share of the time spent waiting for them."
    ]
    if any(run.shared_by > 1 for group in groups for run in group.runs):
        lines.append(
            "Runs that learned from the same batches: img/s is that of their common step; each "
            "counts an equal part of its time and energy."
        )
    if any(number(record, "store_seconds") for group in groups for record in group.finished):
        lines.append(
            "Stores: the time to fill the stores of a run, counted whole for each; runs and seeds "
            "that share a store fill it once. Their share is of training and stores."
        )
    if against:
        advice = " Measured on a CPU: read the ratio, not the speed." if on_cpu else ""
        lines.append(
            f"Time per image / KD: img/s of {', '.join(against)} over img/s of the run; "
            f"precomputing a store is not counted.{advice}"
        )
    elif any(group.method != BASELINE for group in groups):
        lines.append(
            "No time relative to KD: this page has no KD run with the same student, data, batch, "
            "precision and machine."
        )
    if powered:
        several = any(run.processes > 1 for group in groups for run in group.runs)
        whose = "the first GPU's power, used for each of them" if several else "the GPU's power"
        lines.append(
            f"Energy: {whose}, sampled at each log step and integrated over the time of training; "
            "without the host."
        )
    elif on_cpu:
        lines.append("No energy counters here: these runs were on a CPU.")
    else:
        lines.append("No energy: the log has no power samples (nvidia-ml-py takes them on a GPU).")
    return lines
