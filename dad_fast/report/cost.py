"""What a run cost: throughput, energy by the GPU's power samples, and the time against plain distillation (KD) of the same comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dad_fast.methods.registry import BASELINE
from dad_fast.report.markup import numbers, table
from dad_fast.report.run_files import Run, machine, number
from dad_fast.report.runs import Group

# Two runs' speeds are compared only where these are the same.
SAME_WORK = (
    *(
        "student.name",
        "student.model_kwargs",
        "augment.img_size",
        "data.batch_size",
        "data.global_batch_size",
        "data.data_dir",
    ),
    *("precision", "engine.savings"),
)

COLUMNS = (
    *(
        "steps",
        "training time, s",
        "img/s",
        "time per image / KD",
        "data wait, %",
        "GPU memory, GiB",
    ),
    *("power, W", "energy, J per image", "energy, Wh", "bad images"),
)


def throughput(run: Run) -> float | None:
    """Clean images a second over all logged windows together, without evaluation: each window weighs as many images as it trained on."""
    windows = _windows(run)
    seconds = sum(steps / rate for steps, rate, _ in windows)  # in units of a step's images
    return sum(steps for steps, _, _ in windows) / seconds if seconds else None


def joules_per_image(run: Run) -> float | None:
    """Energy of the GPUs per clean image: power, averaged over the two ends of a window, times the window's seconds.

    None without power samples. It counts training alone, not evaluation, and not the host. Of several processes the first logs its
    GPU's power, which stands for all.
    """
    energy, steps_seen, before = 0.0, 0.0, None
    for steps, rate, power in _windows(run):
        if power is not None:
            energy += steps * (power + (power if before is None else before)) / 2 / rate
            steps_seen += steps
        before = power
    return run.processes * energy / steps_seen if steps_seen else None


def _windows(run: Run) -> list[tuple[float, float, float | None]]:
    """Of each log step: steps since the last one, images a second, power in W."""
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
    """The KD run to compare with: the first with the same student, data, batch, precision and machine, of the same comparison if any."""
    same = [
        other
        for other in groups
        if other.method == BASELINE
        and not other.setting("store.dirs")
        and _work(other) == _work(group)
    ]
    return min(same, key=lambda other: other.origin != group.origin, default=None)


def _work(group: Group) -> str:
    settings = {
        path: value
        for run in group.runs[:1]
        for path, value in run.settings.items()
        if any(path == name or path.startswith(f"{name}.") for name in SAME_WORK)
    }
    if not settings:  # nothing is known of it: it is like no other run
        settings = {"run": str(group.runs[0].folder)}
    return json.dumps(
        [settings, sorted({f"{run.processes} x {machine(run.facts)}" for run in group.runs})],
        default=str,
        sort_keys=True,
    )


def mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def cost_table(groups: Sequence[Group]) -> tuple[str, list[str]]:
    """The table, without columns that are empty, and its notes; ("", []) where nothing was trained."""
    groups = [
        group for group in groups if group.finished or any(run.kind("train") for run in group.runs)
    ]
    energy = [mean([joules_per_image(run) for run in group.runs]) for group in groups]
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    against: dict[str, None] = {}
    for group, joules in zip(groups, energy, strict=True):
        logged = [row for run in group.runs for row in run.kind("train")]
        speed, kd = mean([throughput(run) for run in group.runs]), baseline(group, groups)
        kd_speed = mean([throughput(run) for run in kd.runs]) if kd else None
        ratio = kd_speed / speed if speed and kd_speed else None
        if kd and kd is not group and ratio is not None:
            against[kd.label] = None
        images = mean([_images(run) for run in group.runs])
        watt_hours = joules * images / 3600 if joules is not None and images else None
        values: tuple[tuple[Sequence[float | None], str], ...] = (
            ([_steps(run) for run in group.runs], "{:,.0f}"),
            ([number(record, "seconds") for record in group.finished], "{:,.0f}"),
            ([speed], "{:,.0f}" if speed and speed >= 100 else "{:.1f}"),
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
    return (table(["", *shown], body), _notes(groups, powered, list(against))) if body else ("", [])


def _steps(run: Run) -> float | None:
    trained = run.kind("train")
    return number(run.record or {}, "steps") or (number(trained[-1], "step") if trained else None)


def _images(run: Run) -> float | None:
    steps, each = _steps(run), run.images_per_step
    return steps * each if steps and each else None


def _notes(groups: Sequence[Group], powered: bool, against: Sequence[str]) -> list[str]:
    facts: list[dict[str, Any]] = [
        run.facts for group in groups for run in group.runs if machine(run.facts)
    ]
    on_cpu = [not one["gpus"] for one in facts]
    lines = [
        "Means over seeds. img/s counts clean images; evaluation is left out. Data wait: share of the time spent waiting for them."
    ]
    if against:
        what = f"Time per image / KD: img/s of {', '.join(against)} over img/s of the run; precomputing a store is not in it."
        lines.append(
            what
            + (
                " Measured on a CPU: read the ratio, not the speed."
                if on_cpu and all(on_cpu)
                else ""
            )
        )
    elif any(group.method != BASELINE for group in groups):
        lines.append(
            "No time against KD: there is no KD run of the same student, data, batch, precision and machine here."
        )
    if powered:
        several = any(run.processes > 1 for group in groups for run in group.runs)
        whose = "the first GPU's power, taken for each of them" if several else "the GPU's power"
        lines.append(
            f"Energy: {whose}, sampled at each log step and integrated over the time of training; without the host."
        )
    elif on_cpu and all(on_cpu):
        lines.append("No energy counters here: these runs were on a CPU.")
    else:
        lines.append(
            "No energy: the log has no power samples (they come by nvidia-ml-py, on a GPU)."
        )
    return lines
