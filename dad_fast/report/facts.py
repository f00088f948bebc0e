"""Tables of the report that compare runs: models and data, differing settings, environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dad_fast.methods.registry import METHODS
from dad_fast.report.markup import comparison, notes, numbers
from dad_fast.report.run_files import machine, number
from dad_fast.report.runs import Group

# Other parts of the page show the seeds and the device.
NOT_SHOWN = ("seed", "seeds", "device")
# Name of a row and its key in run.json.
ENVIRONMENT = (
    ("GPU", "gpus"),
    ("CPU", "cpu"),
    ("cores", "cpus"),
    ("threads", "threads"),
    ("driver", "driver"),
    ("CUDA", "cuda"),
    ("cuDNN", "cudnn"),
    ("platform", "platform"),
    ("python", "python"),
    ("commit", "git"),
    ("loader", "loader"),
    ("processes", "processes"),
)
# Rows of the table of differing settings; runs of different methods have more.
MAX_DIFFERING = 40


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
        ("hardware", [_hardware(group) for group in groups]),
    ]
    return _without_empty(groups, rows)


def _without_empty(groups: Sequence[Group], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return the rows that have a value as a table with one column per group."""
    filled = [(name, values) for name, values in rows if set(values) != {"–"}]
    return comparison([group.label for group in groups], filled)


def _hardware(group: Group) -> str:
    machines = dict.fromkeys(machine(run.facts) for run in group.runs)
    return ", ".join(filter(None, machines)) or "–"


def _student(group: Group) -> str:
    record = group.finished[0] if group.finished else {}
    name = group.setting("student.name") or record.get("student") or "–"
    parameters = number(record, "num_parameters")
    norm = record.get("bn")
    words = [str(name)]
    if parameters:
        words.append(f"{parameters / 1e6:.2f} M parameters")
    if norm and not group.is_plain:
        words.append(f"batch norm {norm} over clean and attacked")
    return ", ".join(words)


def _part(group: Group, part: str) -> str:
    recorded = next((record[part] for record in group.finished if record.get(part)), None)
    used = recorded or group.runs[0].facts.get(part)
    return str(used["name"]) if isinstance(used, dict) and used.get("name") else "–"


def _attack(group: Group) -> str:
    """Describe the attack; "–" without a discretizer, since such a run attacks nothing."""
    norm, eps = group.setting("attack.norm"), group.setting("attack.eps")
    if _part(group, "discretizer") == "–" or norm is None or eps is None:
        return "–"
    steps, size, start = (
        group.setting(f"attack.{name}") for name in ("steps", "step_size", "random_start")
    )
    ball = "L∞" if norm == "linf" else "L2"
    plural = "" if steps == 1 else "s"
    order = "Q(Q(x) + δ)" if group.setting("attack.order") == "authors" else "Q(x + δ)"
    budget = f"{ball} {eps} in [0, 1] pixels, {steps} step{plural} of {size}"
    return f"{budget}, random start {start}, {order}"


def _data(group: Group) -> str:
    folder = group.setting("data.data_dir")
    if not folder:
        return "–"
    train, val = group.setting("data.train_split"), group.setting("data.val_split")
    size, stores = group.setting("augment.img_size"), group.setting("store.dirs")
    words = f"{folder}, split {train}; validated on {val}"
    if size:
        words += f"; {size} px"
    if isinstance(stores, list) and stores:
        words += f"; stores {', '.join(map(str, stores))}"
    return words


def _training(group: Group) -> str:
    steps = [number(record, "steps") for record in group.finished]
    epochs = [number(record, "epochs") for record in group.finished]
    each = next((run.images_per_step for run in group.runs if run.images_per_step), None)
    size = f" of {each:,} clean images" if each else ""
    if not any(steps):
        planned = group.setting("schedule.epochs")
        if not isinstance(planned, int | float):
            return "–"
        return f"{planned:g} epochs planned{f', steps{size}' if size else ''}"
    num_epochs = numbers(epochs, "{:.4g}".format)
    num_steps = numbers(steps, "{:,.0f}".format)
    return f"{num_epochs} epochs, {num_steps} steps{size}"


def _seeds(group: Group) -> str:
    done = [str(record["seed"]) for record in group.finished]
    rest = len(group.runs) - len(done)
    words = ", ".join(done) or "none finished"
    return words + (f" ({rest} not finished)" if rest and done else "")


def differing(groups: Sequence[Group]) -> str:
    """Return the settings that differ between groups, of those that have a config.toml."""
    known = [group for group in groups if any(run.settings for run in group.runs)]
    missing = [group.label for group in groups if group not in known]
    lines = [f"No config.toml: {', '.join(missing)}."] if missing else []
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
    elif len(rows) > MAX_DIFFERING:
        lines.append(
            f"{len(rows)} settings differ; the first {MAX_DIFFERING} are shown, "
            "all are below under Settings."
        )
    if rows:
        lines.append("Settings that are not listed are the same in all of these runs.")
    return comparison([group.label for group in known], rows[:MAX_DIFFERING]) + notes(lines)


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
    """Return machine, versions and commit; if seeds of a group differ, all of their values."""
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
    return _without_empty(known, rows)


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
    gpus = value if isinstance(value, list) else []
    names = [str(gpu.get("name", "?")) for gpu in gpus if isinstance(gpu, dict)]
    counted = []
    for name in dict.fromkeys(names):
        count = names.count(name)
        counted.append(f"{count} × {name}" if count > 1 else name)
    return ", ".join(counted) or "none"


def _method(group: Group) -> str:
    """Return the method's name and summary; the name alone for one that is not known here."""
    if group.method == "evaluated":
        return "evaluated by dad-fast eval"
    spec = METHODS.find(group.method)
    return f"{group.method}: {spec.summary}" if spec is not None else group.method
