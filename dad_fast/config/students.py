"""Several students of one batch: `--student A B` and `[[students]]`. See resolve.py for layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from dad_fast.config.fields import (
    VARIANT_NAME,
    coerce,
    flatten,
    lookup,
    sections,
    settings,
)
from dad_fast.errors import UsageError

NAME = "student.name"

# label -> settings in which the student differs, by path
Students = dict[str, dict[str, Any]]


def students_of_names(names: Sequence[str], where: str) -> Students:
    """Return the students of `--student A B`. Raises UsageError for two of one name."""
    students: Students = {}
    for name in names:
        _add(students, "", {NAME: name}, where)
    return students


def read_students(tables: Any, where: str) -> Students:
    """Return the students of the tables `[[students]]`.

    A table has the keys of [student], those of other sections in tables of their own, and `label`.
    Raises UsageError.
    """
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{where}: students is a list of tables: [[students]]")
    students: Students = {}
    for number, table in enumerate(tables, start=1):
        own = f"{where}: [[students]] number {number}"
        label = table.get("label", "")
        if not isinstance(label, str):
            raise UsageError(f"{own}: label must be text, got {label!r}")
        changes = {
            path: coerce(lookup(path, own), value, own)
            for path, value in _paths({k: v for k, v in table.items() if k != "label"}, own)
        }
        _add(students, label, changes, own)
    return students


def student_path(key: str, where: str) -> str:
    """Return the setting's path of a key in `[[students]]`: weights, or optim.lr."""
    first = key.partition(".")[0]
    if first == "student":
        raise UsageError(f"{where}: a student's own keys have no section: leave student. out")
    if first in sections():
        return key
    if f"student.{key}" in settings():
        return f"student.{key}"
    if key in settings():
        raise UsageError(f"{where}: {key} cannot differ between students; set it for all of them")
    return lookup(f"student.{key}", where).path


def _paths(table: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        path = student_path(key, where)
        if path in sections():
            yield from flatten({path: value}, where)
        else:
            yield path, value


def _add(students: Students, label: str, changes: dict[str, Any], where: str) -> None:
    name = changes.get(NAME, "")
    if not name:
        raise UsageError(f'{where}: a student needs a name: name = "resnet50"')
    label = label or default_label(name)
    if not VARIANT_NAME.fullmatch(label):
        raise UsageError(
            f"{where}: {label!r} cannot be a student's label: letters, digits and . _ + = - only, "
            "since it becomes a folder"
        )
    if label in students:
        raise UsageError(
            f"{where}: two students are named {label}; give each a label of its own in [[students]]"
        )
    students[label] = changes


def default_label(name: str) -> str:
    """Return the folder of a student without a label: hf-hub:timm/resnet50 is resnet50."""
    last = name.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", last).strip("-.") or name
