"""Tables of the report that set runs side by side: what was trained on what, the settings that differ, the environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dad_fast.methods.registry import METHODS
from dad_fast.report.markup import comparison, notes, numbers
from dad_fast.report.run_files import machine, number
from dad_fast.report.runs import Group

NOT_SHOWN = ("seed", "seeds", "device")  # seeds are in the tables; a device is in the environment
ENVIRONMENT = (
    *(
        ("GPU", "gpus"),
        ("CPU", "cpu"),
        ("cores", "cpus"),
        ("threads", "threads"),
        ("driver", "driver"),
        ("CUDA", "cuda"),
        ("cuDNN", "cudnn"),
    ),
    *(
        ("platform", "platform"),
        ("python", "python"),
        ("commit", "git"),
        ("loader", "loader"),
        ("processes", "processes"),
    ),
)
MANY = 40  # settings; more differ only between runs of different kinds


def trained(groups: Sequence[Group]) -> str:
    rows = [
        ("method", [_method(group) or "–" for group in groups]),
        ("student", [_student(group) for group in groups]),
        ("teacher", [_part(group, "teacher") for group in groups]),
        ("discretizer", [_part(group, "discretizer") for group in groups]),
        ("attack", [_attack(group) for group in groups]),
        ("data", [_data(group) for group in groups]),
        ("training", [_training(group) for group in groups]),
        ("seeds of the student", [_seeds(group) for group in groups]),
        (
            "on",
            [
                ", ".join(dict.fromkeys(filter(None, (machine(run.facts) for run in group.runs))))
                or "–"
                for group in groups
            ],
        ),
    ]
    return comparison(
        [group.label for group in groups],
        [(name, values) for name, values in rows if set(values) != {"–"}],
    )


def _student(group: Group) -> str:
    record = group.finished[0] if group.finished else {}
    name = group.setting("student.name") or record.get("student") or "–"
    parameters = number(record, "num_parameters")
    words = [str(name)] + ([f"{parameters / 1e6:.2f} M parameters"] if parameters else [])
    norm = record.get("bn")
    return ", ".join(
        words
        + ([f"batch norm {norm} over clean and attacked"] if norm and not group.is_plain else [])
    )


def _part(group: Group, part: str) -> str:
    used = next(
        (record[part] for record in group.finished if record.get(part)), None
    ) or group.runs[0].facts.get(part)
    return str(used["name"]) if isinstance(used, dict) and used.get("name") else "–"


def _attack(group: Group) -> str:
    """What the images that the student sees are made with; a run without a discretizer attacks nothing."""
    norm, eps = group.setting("attack.norm"), group.setting("attack.eps")
    if _part(group, "discretizer") == "–" or norm is None or eps is None:
        return "–"
    steps, size, start = (
        group.setting(f"attack.{name}") for name in ("steps", "step_size", "random_start")
    )
    words = f"{'L∞' if norm == 'linf' else 'L2'} {eps} in [0, 1] pixels, {steps} step{'' if steps == 1 else 's'} of {size}"
    return f"{words}, random start {start}, {'Q(Q(x) + δ)' if group.setting('attack.order') == 'authors' else 'Q(x + δ)'}"


def _data(group: Group) -> str:
    folder = group.setting("data.data_dir")
    if not folder:
        return "–"
    size = group.setting("augment.img_size")
    words = f"{folder}, split {group.setting('data.train_split')}; validated on {group.setting('data.val_split')}"
    stores = group.setting("store.dirs")
    words += f"; {size} px" if size else ""
    return words + (
        f"; stores {', '.join(map(str, stores))}" if isinstance(stores, list) and stores else ""
    )


def _training(group: Group) -> str:
    steps = [number(record, "steps") for record in group.finished]
    epochs = [number(record, "epochs") for record in group.finished]
    each = next((run.images_per_step for run in group.runs if run.images_per_step), None)
    size = f" of {each:,} clean images" if each else ""
    if not any(steps):
        planned = group.setting("schedule.epochs")
        return (
            f"{planned:g} epochs planned{f', steps{size}' if size else ''}"
            if isinstance(planned, int | float)
            else "–"
        )
    return f"{numbers(epochs, lambda value: f'{value:.4g}')} epochs, {numbers(steps, lambda value: f'{value:,.0f}')} steps{size}"


def _seeds(group: Group) -> str:
    done = [str(record["seed"]) for record in group.finished]
    rest = len(group.runs) - len(done)
    words = ", ".join(done) or "none finished"
    return words + (f" ({rest} not finished)" if rest and done else "")


def differing(groups: Sequence[Group]) -> str:
    """Settings that are not the same in all groups, out of those whose config.toml is left."""
    known = [group for group in groups if any(run.settings for run in group.runs)]
    missing = [group.label for group in groups if group not in known]
    lines = [f"No config.toml is left of {', '.join(missing)}."] if missing else []
    if len(known) < 2:
        return notes(lines)
    paths = dict.fromkeys(path for group in known for run in group.runs for path in run.settings)
    rows = []
    for path in paths:
        values = [_values(group, path) for group in known]
        if path not in NOT_SHOWN and not path.startswith("variants.") and len(set(values)) > 1:
            rows.append((path, values))
    if not rows:
        lines.append("No setting differs but the seed.")
    elif len(rows) > MANY:
        lines.append(
            f"{len(rows)} settings differ; the first {MANY} are shown, all are below under Settings."
        )
    if rows:
        lines.append("Settings that are not listed are the same in all of these runs.")
    return comparison([group.label for group in known], rows[:MANY]) + notes(lines)


def _values(group: Group, path: str) -> str:
    found = dict.fromkeys(
        _word(run.settings[path]) if path in run.settings else "not set"
        for run in group.runs
        if run.settings
    )
    return " | ".join(found)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, list):
        return ", ".join(map(_word, value)) or "none"
    if isinstance(value, dict):
        return json.dumps(value, default=str) if value else "none"
    return str(value) if value != "" else "none"


def environment(groups: Sequence[Group]) -> str:
    """Machine, versions and commit; where seeds of a group differ, all of theirs."""
    known = [group for group in groups if any(run.facts for run in group.runs)]
    if not known:
        return ""
    packages = dict.fromkeys(
        name for group in known for run in group.runs for name in _packages(run.facts)
    )
    rows = [(name, [_environment(group, key) for group in known]) for name, key in ENVIRONMENT]
    rows += [
        (name, [_environment(group, name, packages=True) for group in known]) for name in packages
    ]
    return comparison(
        [group.label for group in known],
        [(name, values) for name, values in rows if set(values) != {"–"}],
    )


def _packages(facts: dict[str, Any]) -> dict[str, Any]:
    packages = facts.get("packages")
    return packages if isinstance(packages, dict) else {}


def _environment(group: Group, key: str, packages: bool = False) -> str:
    found: dict[str, None] = {}
    for run in group.runs:
        value = _packages(run.facts).get(key) if packages else run.facts.get(key)
        if key == "gpus":
            value = _gpus(value)
        found[str(value) if value not in (None, "", []) else "–"] = None
    return " | ".join(found) or "–"


def _gpus(value: Any) -> str:
    names = (
        [str(gpu.get("name", "?")) for gpu in value if isinstance(gpu, dict)]
        if isinstance(value, list)
        else []
    )
    return (
        ", ".join(
            f"{names.count(name)} × {name}" if names.count(name) > 1 else name
            for name in dict.fromkeys(names)
        )
        or "none"
    )


def _method(group: Group) -> str:
    """Return the method's name and summary; the name alone for one that is not known here."""
    if group.method == "evaluated":
        return "evaluated by dad-fast eval"
    spec = METHODS.find(group.method)
    return f"{group.method}: {spec.summary}" if spec is not None else group.method
