"""A user's own nn.Module as student or teacher, passed from Python.

Settings and files record it as `module:CLASS`. The class itself is in no file, so a run of such a
module is resumed, evaluated and loaded only where the module is passed again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from dad_fast.config.schema import StudentConfig
from dad_fast.errors import DataError, UsageError
from dad_fast.models.registry import MODULE
from dad_fast.models.teacher import Teacher, TeacherContext
from dad_fast.models.weights.hub import reason_of

# Settings of [student] that only a timm model can follow.
TIMM_ONLY = (
    "weights",
    "init_from",
    "pretrained",
    "drop",
    "drop_path",
    "drop_block",
    "model_kwargs",
)
_NOTHING: Mapping[str, nn.Module] = MappingProxyType({})
_passed: ContextVar[Mapping[str, nn.Module]] = ContextVar("modules", default=_NOTHING)


@contextmanager
def passed(*, student: object = None, teacher: object = None) -> Iterator[None]:
    """Make the modules among the arguments available by their names inside the block."""
    given = {"student": student, "teacher": teacher}
    found = {role: module for role, module in given.items() if isinstance(module, nn.Module)}
    token = _passed.set({**_passed.get(), **found})
    try:
        yield
    finally:
        _passed.reset(token)


def module_name(module: nn.Module) -> str:
    """Return the name by which settings and files record a module: module:CLASS."""
    return f"{MODULE}{type(module).__name__}"


def find(role: str, name: str) -> nn.Module:
    """Return the module that was passed as `role` ("student" or "teacher") and has this name.

    Raises UsageError if there is none.
    """
    module = _passed.get().get(role)
    if module is None or module_name(module) != name:
        raise UsageError(
            f"--{role} {name}: a user's own nn.Module, whose class no file contains; in Python, pass "
            f"it again: df.train(..., {role}=MODULE)"
        )
    return module


def module_of_file(name: str, path: Path) -> nn.Module:
    """Return a copy of the passed student, for the weights in `path`. Raises DataError without."""
    try:
        return copy.deepcopy(find("student", name))
    except UsageError:
        raise DataError(
            f"{path}: weights of {name}, a user's own nn.Module, whose class the file does not "
            "contain; in Python, load them into it: df.load_student(PATH, module=MODULE)"
        ) from None


def student_module(
    cfg: StudentConfig, num_classes: int, img_size: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of the passed student and its specification (`Student.spec`).

    A model with timm's `pretrained_cfg` gets pixels normalised as that says, any other gets them in
    [0, 1]. Raises UsageError for settings that need a timm model, for an unknown image size, and for
    an output that is not [B, num_classes].
    """
    unset = StudentConfig()
    for key in TIMM_ONLY:
        if getattr(cfg, key) != getattr(unset, key):
            raise UsageError(
                f"student.{key}: needs a timm model by its name; build it into the {cfg.name} that "
                "you pass"
            )
    model = copy.deepcopy(find("student", cfg.name))
    view = _view(model)
    side = img_size or view["img_size"]
    _check_output("student", cfg.name, model, side, num_classes)
    return model, {
        "name": cfg.name,
        "model_kwargs": {},
        "num_classes": num_classes,
        **view,
        "img_size": side,
    }


def load_teacher_module(argument: str, context: TeacherContext) -> Teacher:
    """Make a frozen teacher of a copy of the passed module. See `student_module` for its pixels.

    Raises UsageError if no such module was passed, for an unknown image size, and for an output
    that is not one logit for each class.
    """
    name = f"{MODULE}{argument}"
    model = copy.deepcopy(find("teacher", name)).cpu()
    view = _view(model)
    side = context.cfg.img_size or view["img_size"]
    _check_output("teacher", name, model, side, len(context.classes))
    return Teacher(
        model,
        model,
        name=name,
        classes=context.classes,
        image_size=side,
        mean=view["mean"],
        std=view["std"],
        precision=context.precision,
        crop_pct=view["crop_pct"],
        interpolation=view["interpolation"],
        squashed=view["squashed"],
    )


def _view(model: nn.Module) -> dict[str, Any]:
    """Return preprocessing as `Student.spec` has it; img_size is 0 if the model does not tell."""
    if not getattr(model, "pretrained_cfg", None):
        return {
            "img_size": 0,
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "squashed": False,
        }
    data = resolve_data_config({}, model=model)
    return {
        "img_size": data["input_size"][-1],
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "crop_pct": data["crop_pct"],
        "interpolation": data["interpolation"],
        "squashed": data["crop_mode"] == "squash",
    }


@torch.no_grad()
def _check_output(role: str, name: str, model: nn.Module, side: int, num_classes: int) -> None:
    """Raise UsageError unless one image gives logits [1, num_classes]. Leaves eval mode on."""
    size = "img_size" if role == "student" else "teacher_img_size"
    if not side:
        raise UsageError(f"--{role} {name}: its input size is not known; add {size}=PIXELS")
    parameter = next(model.parameters(), torch.empty(0))
    pixels = torch.zeros(1, 3, side, side, device=parameter.device)
    try:
        output = model.eval()(pixels)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"--{role} {name}: cannot take images of {side} px ({reason_of(error)}); check {size}, "
            "and that the module is float32 and takes [B, 3, H, W]"
        ) from None
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (1, num_classes):
        raise UsageError(
            f"--{role} {name}: its output for one image is {shape}, not logits (1, {num_classes}); "
            "pass a module with one output for each class of the data"
        )
