"""Load run folders for the report: finished, in progress, or damaged.

A folder is one run (OUT) or a comparison (OUT/VARIANT/seed-S). A `Group` is a column of the report:
the seeds of one variant. Problems do not raise, they become lines in `problems`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dad_fast.config import expand, from_toml
from dad_fast.errors import DataError, UsageError
from dad_fast.methods.registry import METHODS
from dad_fast.report.run_files import (
    FILES,
    Run,
    check_record,
    machine,
    number,
    read_json,
    read_run,
    short_name,
)


@dataclass
class Group:
    """The seeds of one variant.

    origin: the folder that the user named; groups with the same origin belong to one comparison
    """

    label: str
    origin: Path
    runs: list[Run]

    @property
    def finished(self) -> list[dict[str, Any]]:
        """Records of the seeds that are finished."""
        return [run.record for run in self.runs if run.record is not None]

    @property
    def method(self) -> str:
        recorded = next((record["method"] for record in self.finished), "")
        return str(self.setting("method") or recorded)

    @property
    def is_plain(self) -> bool:
        """True if the students were trained on clean images alone."""
        spec = METHODS.find(self.method)
        return spec is not None and spec.is_plain

    def setting(self, path: str) -> Any:
        """Return a setting of the first seed that has it; None without a config.toml."""
        return next((run.settings[path] for run in self.runs if path in run.settings), None)


class Found(NamedTuple):
    """A group before it has a label."""

    origin: Path  # the folder that the user named
    place: Path  # the folder of the variant, or of a single run
    variant: str  # "" for a single run
    runs: list[Run]


@dataclass
class Loaded:
    """Content of the page. `config` is the TOML of a comparison, if one folder was named."""

    groups: list[Group]
    problems: list[str]
    config: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """Every finished run under its group's label, as `dad_fast.evaluation.tables` reads it."""
        runs = [
            {**record, "variant": group.label} for group in self.groups for record in group.finished
        ]
        facts = [run.facts for group in self.groups for run in group.runs if machine(run.facts)]
        record: dict[str, Any] = {"runs": _name_teachers(runs)}
        if len({machine(found) for found in facts}) == 1:
            record["environment"] = facts[0]
        return record


def load(folders: Sequence[str | Path]) -> Loaded:
    """Load every run in `folders`. Raises DataError if a folder is missing or contains no run."""
    problems: list[str] = []
    named = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    found: list[Found] = []
    config = ""
    for given, folder in zip(dict.fromkeys(map(str, folders)), named, strict=False):
        if not folder.exists():
            raise DataError(
                f"{given}: no such file or folder; name a run's folder "
                "or a file of dad-fast eval --json"
            )
        if not folder.is_dir():
            found += _evaluation(folder, given, problems)
            continue
        record = read_json(folder / "results.json", problems)
        inside = sorted(
            {path.parent for name in FILES for path in folder.glob(f"*/seed-*/{name}")},
            key=_order(folder),
        )
        if isinstance(record, dict) and isinstance(record.get("runs"), list):
            config = str(record.get("config", ""))
            found += _comparison(folder, record, inside, problems)
        elif inside:
            found += _by_parent(folder, [read_run(path, problems) for path in inside])
            problems.append(
                f"{short_name(folder)}: no results.json of the whole comparison, "
                "so it is in progress or was stopped"
            )
        elif any((folder / name).exists() for name in FILES):
            found.append(Found(folder, folder, "", [read_run(folder, problems, record)]))
        else:
            raise DataError(
                f"{given}: no run has written to it (none of {', '.join(FILES)}); "
                "name the folder of a run or of a comparison"
            )

    groups = _label(_join_seeds(found))
    for group in groups:
        problems += [_unfinished(group, run) for run in group.runs if run.record is None]
    return Loaded(groups, list(dict.fromkeys(problems)), config if len(named) == 1 else "")


def _comparison(
    folder: Path, record: dict[str, Any], inside: Sequence[Path], problems: list[str]
) -> list[Found]:
    """Load the runs that a comparison's results.json lists; other folders are ignored."""
    groups: dict[str, list[Run]] = {}
    for entry in record["runs"]:
        checked = check_record(entry, folder / "results.json", problems)
        if checked is None:
            continue
        path = folder / _plain_name(checked["variant"]) / f"seed-{checked['seed']}"
        run = read_run(path, problems, checked) if path in inside else Run(path, checked)
        if not run.facts and isinstance(record.get("environment"), dict):
            run.facts = record["environment"]
        groups.setdefault(checked["variant"], []).append(run)
    return [Found(folder, folder / _plain_name(name), name, runs) for name, runs in groups.items()]


def _evaluation(path: Path, given: str, problems: list[str]) -> list[Found]:
    """Load a file of `dad-fast eval --json`, a group per model; raise DataError for other files."""
    record = read_json(path, problems)
    models: Any = None
    if isinstance(record, dict):
        single = record.get("checkpoint") or record.get("teacher")
        models = record.get("models") or {path.stem: single}
    evaluated: dict[str, dict[str, Any]] = {}
    if isinstance(models, dict):
        for name, model in models.items():
            if isinstance(model, dict) and "suites" in model:
                evaluated[name] = model
    if not evaluated:
        raise DataError(
            f"{given}: is a file, and no result of dad-fast eval --json; name a run's folder"
        )
    facts = record["environment"] if isinstance(record.get("environment"), dict) else {}
    shared = {"method": "evaluated", "teacher": record.get("teacher")}
    found = []
    for name, model in evaluated.items():
        checked = check_record({**shared, **model, "variant": name}, path, problems)
        if checked is not None:
            found.append(Found(path, path.parent / name, name, [Run(path, checked, facts=facts)]))
    return found


def _plain_name(name: str) -> str:
    """Return a name that cannot lead out of its folder; the trainer accepts no other."""
    return re.sub(r"[/\\\0]|^\.+$", "_", name)


def _by_parent(origin: Path, runs: Sequence[Run]) -> list[Found]:
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.folder.parent, []).append(run)
    return [Found(origin, parent, parent.name, members) for parent, members in groups.items()]


def _join_seeds(found: Sequence[Found]) -> list[Found]:
    """Join runs that were named one by one, DIR/seed-0 DIR/seed-1, as the seeds of DIR."""
    joined: dict[tuple[Path, str], Found] = {}
    for origin, place, variant, runs in found:
        if not variant and re.fullmatch(r"seed-\d+", place.name):
            origin, place, variant = place.parent.parent, place.parent, place.parent.name
        known = joined.setdefault((place, variant), Found(origin, place, variant, []))
        have = {run.folder for run in known.runs}
        known.runs.extend(run for run in runs if run.folder not in have)
    return list(joined.values())


def _label(found: Sequence[Found]) -> list[Group]:
    """Give each group a short name: as many of its path's last parts as make it unique."""
    places = [one.place for one in found]
    one_origin = len({one.origin for one in found}) == 1
    groups = []
    for origin, place, variant, runs in found:
        if len(found) == 1 or (one_origin and variant):
            recorded = next(
                (run.record["variant"] for run in runs if run.record),
                str(runs[0].facts.get("variant") or place.name),
            )
            groups.append(Group(variant or recorded, origin, runs))
            continue
        others = [other for other in places if other != place]
        length = 1
        while length < len(place.parts) and any(
            other.parts[-length:] == place.parts[-length:] for other in others
        ):
            length += 1
        groups.append(Group("/".join(place.parts[-length:]), origin, runs))
    return groups


def _name_teachers(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge teachers of one name, which share a row of the table, unless their numbers disagree."""
    known: dict[str, dict[str, Any]] = {}
    for run in runs:
        teacher = run.get("teacher")
        if teacher is None:
            continue
        name = teacher["name"]
        for label in (name, f"{name} ({run['variant']})"):
            suites = known.setdefault(label, {})
            agrees = all(
                suites.get(suite, result)["top1"] == result["top1"]
                for suite, result in teacher["suites"].items()
            )
            if agrees:
                suites.update(teacher["suites"])
                run["teacher"] = {**teacher, "name": label, "suites": suites}
                break
    return runs


def _unfinished(group: Group, run: Run) -> str:
    """Describe how far a run without results has come."""
    name = group.label
    if run.folder.name.startswith("seed-"):
        name = f"{group.label}/{run.folder.name}"
    trained = run.kind("train")
    if not trained:
        return f"{name}: no results and no logged step yet: in progress, or stopped at the start"

    step, epoch, moment = (number(trained[-1], key) for key in ("step", "epoch", "time"))
    last = f"step {step:,.0f}" if step is not None else "a step"
    if epoch is not None:
        last += f" (epoch {epoch:.3g})"
    if moment is not None and 0 <= moment < 4e9:
        last += time.strftime(" at %Y-%m-%d %H:%M UTC", time.gmtime(moment))
    return f"{name}: no results yet: in progress, or stopped. Last logged: {last}"


def _order(folder: Path) -> Callable[[Path], tuple[int, str, int]]:
    """Return a sort key of seed folders: variants and students as config.toml lists them, then
    seeds.
    """
    try:
        cfg = from_toml((folder / "config.toml").read_text(encoding="utf-8"))
        listed = list(dict.fromkeys(name for name, _, _ in expand(cfg)))
    except (OSError, ValueError, UsageError):
        listed = []

    def place(run: Path) -> tuple[int, str, int]:
        variant, seed = run.parent.name, run.name.removeprefix("seed-")
        position = listed.index(variant) if variant in listed else len(listed)
        return position, variant, int(seed) if seed.isdecimal() else 0

    return place
