"""Teachers by name. To add one: a file with a factory, and here a line and its entry in FORMS.

A factory is called with the argument after the name's colon and a `TeacherContext`, and returns a
`Teacher`. Names joined by + are an ensemble of teachers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dad_fast.config.schema import Config, TeacherConfig
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
TEACHERS.add("module", "dad_fast.models.own_modules:load_teacher_module")


class Form(NamedTuple):
    """A way to write --teacher, and the teacher that it names; for messages and docs/models.md."""

    text: str
    summary: str


# Name in the registry -> its forms; none for a module, which only Python code can pass
FORMS = {
    "open_clip": (
        Form(
            "open_clip:ARCH/TAG",
            "published CLIP, downloaded; zero-shot head from class names, or `--teacher-head FILE`",
        ),
        Form("open_clip:ARCH@FILE", "the same from a local file"),
    ),
    "timm": (
        Form(
            "timm:NAME",
            "classifier of timm (ImageNet's 1000 classes, a part of them, or exactly the data's "
            "classes), or any encoder of timm with `--teacher-head FILE`",
        ),
        Form("timm:NAME@FILE", "the same from a local file"),
        Form(
            "timm:hf-hub:REPO",
            "timm model of the hub, also one that `export --push` uploaded; class names that it "
            "records must be the data's",
        ),
    ),
    "hf-hub": (
        Form("hf-hub:REPO", "CLIP of the hub in open_clip's format, downloaded; zero-shot"),
    ),
    "embedded": (Form("embedded:digits", "the demo's teacher, in the package"),),
    "file": (
        Form("RUN", "run of this project (`ce`, `kd`, `dad`, ...), by its folder"),
        Form(
            "RUN/model.safetensors",
            "weights of a run; the file names the architecture, size and crop",
        ),
    ),
    "module": (),
}

TIMM = "timm:"
# Start of the name of a user's own nn.Module, which Python code passes: module:CLASS
MODULE = "module:"


def is_registered(name: str) -> bool:
    """Return whether `name` is NAME:ARGUMENT of a registered teacher, and not a path."""
    return ":" in name and TEACHERS.split(name)[0] in TEACHERS


def names_teacher(name: str) -> bool:
    """Return whether `name` is that of a registered teacher or of an ensemble, and not a path."""
    return is_registered(name) or len(split_names(name)) > 1


def split_names(text: str) -> list[str]:
    """Return the names in `A+B`, one or several.

    A + inside the name of an existing file, alone or after @, belongs to that name.
    """
    names = []
    parts = text.split("+")
    while parts:
        counts = range(len(parts), 1, -1)
        count = next((n for n in counts if _is_file_name(parts[:n])), 1)
        names.append("+".join(parts[:count]))
        del parts[:count]
    return names


def _is_file_name(parts: list[str]) -> bool:
    """Return whether the joined parts are FILE or ARCH@FILE of an existing file."""
    before, at, _ = parts[0].partition("@")
    name = "+".join(parts)
    return Path(name.removeprefix(before + at) if at else name).exists()


def members(cfg: TeacherConfig) -> list[TeacherConfig]:
    """Return the settings of each member of an ensemble, or of the one teacher.

    Raises UsageError for names, heads and weights that do not belong together, and for a timm
    model under its name on the hub.
    """
    names = split_names(cfg.name)
    if len(names) > 1 and "" in names:
        raise UsageError(f"--teacher {cfg.name}: a name is missing next to a +")
    for name in names:
        _check_name(name)
        if names.count(name) > 1:
            raise UsageError(f"--teacher {cfg.name}: {name} twice; raise its --teacher-weights")
    if cfg.weights and len(cfg.weights) != len(names):
        raise UsageError(
            f"--teacher-weights: {len(cfg.weights)} weights for {len(names)} in --teacher "
            f"{cfg.name}; give one for each, or none"
        )
    if cfg.img_size and not any(name.startswith((TIMM, MODULE)) for name in names):
        raise UsageError(
            f"--teacher-img-size: --teacher {cfg.name} has a fixed input size; only timm: teachers "
            "can be resized"
        )
    heads = split_names(cfg.head) if cfg.head else [""] * len(names)
    if len(heads) != len(names):
        raise UsageError(
            f"--teacher-head {cfg.head}: {len(heads)} for {len(names)} in --teacher {cfg.name}; "
            "join one for each by +, with nothing where a teacher has its own"
        )
    return [
        replace(
            cfg,
            name=name,
            head=head,
            weights=(),
            img_size=cfg.img_size if name.startswith((TIMM, MODULE)) else 0,
        )
        for name, head in zip(names, heads, strict=True)
    ]


def _check_name(name: str) -> None:
    if name.startswith("timm/") and not Path(name).exists():
        model = name.removeprefix("timm/")
        raise UsageError(f"--teacher {name}: a name of the hub; write timm:{model}")


def teacher_settings(cfg: Config) -> tuple[Any, ...]:
    """Return the settings that the outputs of a run's teacher depend on.

    Beside its section this is the temperature at which an ensemble averages probabilities.
    """
    is_ensemble = len(split_names(cfg.teacher.name)) > 1
    averages = is_ensemble and cfg.teacher.average == "probabilities"
    return (cfg.teacher, cfg.loss.temperature) if averages else (cfg.teacher,)
