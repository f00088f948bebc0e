"""Reads run folders for the report: finished, in progress, from older versions, or damaged. What is wrong is a line in `problems`.

A folder is one run (OUT), or a comparison (OUT/VARIANT/seed-S). A `Group` is a column of the report: the seeds of one variant.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dad_fast.config.fields import read_toml
from dad_fast.errors import DataError
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
    """The seeds of one variant. `origin` is the folder that the user named: runs with the same one belong to one comparison."""

    label: str
    origin: Path
    runs: list[Run]

    @property
    def finished(self) -> list[dict[str, Any]]:
        return [run.record for run in self.runs if run.record is not None]

    @property
    def method(self) -> str:
        return str(
            self.setting("method") or next((record["method"] for record in self.finished), "")
        )

    @property
    def is_plain(self) -> bool:
        """Whether the students were trained on clean images alone."""
        spec = METHODS.find(self.method)
        return spec is not None and spec.is_plain

    def setting(self, path: str) -> Any:
        """The value of a setting, of the first seed that has it; None where no config.toml is left."""
        return next((run.settings[path] for run in self.runs if path in run.settings), None)


class Found(NamedTuple):
    """A group before it has a label: the folder that was named, the folder that tells the group from others, the variant or ""."""

    origin: Path
    place: Path
    variant: str
    runs: list[Run]


@dataclass
class Loaded:
    groups: list[Group]
    problems: list[str]
    config: str = ""  # TOML of the comparison, where one folder was named

    @property
    def record(self) -> dict[str, Any]:
        """What `dad_fast.evaluate.tables` reads: every finished run, under its group's label."""
        runs = [
            {**record, "variant": group.label} for group in self.groups for record in group.finished
        ]
        facts = [run.facts for group in self.groups for run in group.runs if machine(run.facts)]
        one = len({machine(found) for found in facts}) == 1
        return {"runs": _name_teachers(runs), **({"environment": facts[0]} if one else {})}


def load(folders: Sequence[str | Path]) -> Loaded:
    """Every run in `folders`. Raises DataError for a folder that is missing or that no run has written to."""
    problems: list[str] = []
    named = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    found: list[Found] = []
    config = ""
    for given, folder in zip(dict.fromkeys(map(str, folders)), named, strict=False):
        if not folder.exists():
            raise DataError(
                f"{given}: no such file or folder; name a run's folder, or a file of dad-fast eval --json"
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
                f"{short_name(folder)}: no results.json of the whole comparison, so it is in progress or was stopped"
            )
        elif any((folder / name).exists() for name in FILES):
            found.append(Found(folder, folder, "", [read_run(folder, problems, record)]))
        else:
            raise DataError(
                f"{given}: no run has written to it (none of {', '.join(FILES)}); name a run's folder or a comparison's"
            )
    groups = _label(_join_seeds(found))
    problems += [
        line
        for group in groups
        for run in group.runs
        if run.record is None
        for line in [_unfinished(group, run)]
    ]
    return Loaded(groups, list(dict.fromkeys(problems)), config if len(named) == 1 else "")


def _comparison(
    folder: Path, record: dict[str, Any], inside: Sequence[Path], problems: list[str]
) -> list[Found]:
    """The runs of a comparison's results.json, with what their folders hold; folders that it does not list are left alone."""
    groups: dict[str, list[Run]] = {}
    for entry in record["runs"]:
        checked = check_record(entry, folder / "results.json", problems)
        if checked is None:
            continue
        path = folder / _plain_name(checked["variant"]) / f"seed-{checked['seed']}"
        run = read_run(path, problems, checked) if path in inside else Run(path, checked)
        run.facts = run.facts or (
            record["environment"] if isinstance(record.get("environment"), dict) else {}
        )
        groups.setdefault(checked["variant"], []).append(run)
    return [Found(folder, folder / _plain_name(name), name, runs) for name, runs in groups.items()]


def _evaluation(path: Path, given: str, problems: list[str]) -> list[Found]:
    """The models in a file of `dad-fast eval --json`, a group each. Raises DataError for any other file."""
    record = read_json(path, problems)
    models = (
        record.get("models") or {path.stem: record.get("checkpoint") or record.get("teacher")}
        if isinstance(record, dict)
        else {}
    )
    judged = (
        {name: one for name, one in models.items() if isinstance(one, dict) and "suites" in one}
        if isinstance(models, dict)
        else {}
    )
    if not judged:
        raise DataError(
            f"{given}: is a file, and no result of dad-fast eval --json; name a run's folder"
        )
    facts = record["environment"] if isinstance(record.get("environment"), dict) else {}
    found = []
    for name, one in judged.items():
        checked = check_record(
            {"method": "evaluated", "teacher": record.get("teacher"), **one, "variant": name},
            path,
            problems,
        )
        if checked is not None:
            found.append(Found(path, path.parent / name, name, [Run(path, checked, facts=facts)]))
    return found


def _plain_name(name: str) -> str:
    """A name that cannot lead out of its folder; the trainer accepts no other."""
    return re.sub(r"[/\\\0]|^\.+$", "_", name)


def _by_parent(origin: Path, runs: Sequence[Run]) -> list[Found]:
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.folder.parent, []).append(run)
    return [Found(origin, parent, parent.name, members) for parent, members in groups.items()]


def _join_seeds(found: Sequence[Found]) -> list[Found]:
    """Single runs named one by one, DIR/seed-0 DIR/seed-1, are the seeds of DIR."""
    joined: dict[tuple[Path, str], Found] = {}
    for origin, place, variant, runs in found:
        if not variant and re.fullmatch(r"seed-\d+", place.name):
            origin, place, variant = place.parent.parent, place.parent, place.parent.name
        known = joined.setdefault((place, variant), Found(origin, place, variant, []))
        have = {run.folder for run in known.runs}
        known.runs.extend(run for run in runs if run.folder not in have)
    return list(joined.values())


def _label(found: Sequence[Found]) -> list[Group]:
    """Short names that tell the groups apart: as many of a path's last parts as it takes."""
    places = [one.place for one in found]
    groups = []
    for origin, place, variant, runs in found:
        if len(found) == 1 or (len({one.origin for one in found}) == 1 and variant):
            label = variant or next(
                (run.record["variant"] for run in runs if run.record),
                str(runs[0].facts.get("variant") or place.name),
            )
        else:
            rest = [other for other in places if other != place]
            parts = next(
                (
                    n
                    for n in range(1, len(place.parts))
                    if all(o.parts[-n:] != place.parts[-n:] for o in rest)
                ),
                len(place.parts),
            )
            label = "/".join(place.parts[-parts:])
        groups.append(Group(label, origin, runs))
    return groups


def _name_teachers(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Teachers of one name are one row of the table, with the suites of all; where their numbers disagree they are told apart."""
    known: dict[str, dict[str, Any]] = {}
    for run in runs:
        teacher = run.get("teacher")
        if teacher is None:
            continue
        name = teacher["name"]
        for label in (name, f"{name} ({run['variant']})"):
            suites = known.setdefault(label, {})
            if all(
                suites.get(suite, result)["top1"] == result["top1"]
                for suite, result in teacher["suites"].items()
            ):
                suites.update(teacher["suites"])
                run["teacher"] = {**teacher, "name": label, "suites": suites}
                break
    return runs


def _unfinished(group: Group, run: Run) -> str:
    name = (
        f"{group.label}/{run.folder.name}" if run.folder.name.startswith("seed-") else group.label
    )
    trained = run.kind("train")
    if not trained:
        return f"{name}: no results and no logged step yet: in progress, or stopped at the start"
    step, epoch, moment = (number(trained[-1], key) for key in ("step", "epoch", "time"))
    where = f"step {step:,.0f}" if step is not None else "a step"
    where += f" (epoch {epoch:.3g})" if epoch is not None else ""
    when = (
        f" at {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(moment))}"
        if moment is not None and 0 <= moment < 4e9
        else ""
    )
    return f"{name}: no results yet: in progress, or stopped. Last logged: {where}{when}"


def _order(folder: Path) -> Callable[[Path], tuple[int, str, int]]:
    """Runs as they were started: variants as the comparison's config.toml lists them, then by seed."""
    try:
        listed = list(read_toml((folder / "config.toml").read_text(encoding="utf-8"))["variants"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = []

    def place(run: Path) -> tuple[int, str, int]:
        variant, seed = run.parent.name, run.name.removeprefix("seed-")
        return (
            listed.index(variant) if variant in listed else len(listed),
            variant,
            int(seed) if seed.isdecimal() else 0,
        )

    return place
