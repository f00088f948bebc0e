"""Teachers by name. To add one: a file with a factory, and a line here.

A factory is called with the argument after the name's colon and a `TeacherContext`, and returns a
`Teacher`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dad_fast.errors import UsageError
from dad_fast.registry import Registry

if TYPE_CHECKING:
    from dad_fast.models.teacher import Teacher, TeacherContext

Factory = Callable[[str, "TeacherContext"], "Teacher"]
TEACHERS: Registry[Factory] = Registry("teacher", "dad_fast.teachers", "--teacher")
TEACHERS.add("open_clip", "dad_fast.models.clip_teacher:load_open_clip")
TEACHERS.add("timm", "dad_fast.models.timm_teacher:load_timm")
TEACHERS.add("hf-hub", "dad_fast.models.clip_teacher:load_hub")
TEACHERS.add("embedded", "dad_fast.models.clip_teacher:load_embedded")
TEACHERS.add("file", "dad_fast.models.file_teacher:load_file")


def is_registered(name: str) -> bool:
    """Return whether `name` is NAME:ARGUMENT of a registered teacher, and not a path."""
    return ":" in name and TEACHERS.split(name)[0] in TEACHERS


def check_teacher_name(name: str) -> None:
    """Raise UsageError for a timm model under its name on the hub."""
    if name.startswith("timm/") and not Path(name).exists():
        model = name.removeprefix("timm/")
        raise UsageError(f"--teacher {name}: a name of the hub; write timm:{model}")
