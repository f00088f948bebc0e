"""From settings to the parts of a run. Everything that a user can get wrong fails here, before a file is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dad_fast.config.schema import USES_DISCRETIZER, USES_TEACHER, Config
from dad_fast.data.sources import Source, open_source
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.methods.objectives import TERMS
from dad_fast.models.discretizer import Discretizer, load_discretizer
from dad_fast.models.student import Student, build_student
from dad_fast.models.teacher import Teacher, load_teacher


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `teacher` and `discretizer` are None where the method needs none."""

    device: torch.device
    train: Source
    val: Source
    student: Student
    teacher: Teacher | None
    discretizer: Discretizer | None


class Builder:
    """Builds the parts of one run after another; frozen parts (data, teacher, discretizer) are shared between runs."""

    def __init__(self) -> None:
        self._frozen: dict[Any, Any] = {}

    def build(self, cfg: Config) -> Parts:
        device = resolve_device(cfg.device)
        train = self._once(("source", cfg.data.train_split, repr(cfg.data)), lambda: _source(cfg, cfg.data.train_split))
        val = self._once(("source", cfg.data.val_split, repr(cfg.data)), lambda: _source(cfg, cfg.data.val_split))
        if val.classes != train.classes:
            splits, other = f"{cfg.data.train_split} and {cfg.data.val_split}", set(train.classes.folders) ^ set(val.classes.folders)
            what = f"only one of {splits} has the class {min(other)}" if other else f"{splits} order their classes differently"
            raise DataError(f"--data-dir {cfg.data.data_dir}: {what}; mend the folders or give --class-map")
        teacher = discretizer = None
        if USES_TEACHER[cfg.method]:
            of_teacher = ("teacher", repr(cfg.teacher), repr(cfg.precision), str(device), train.classes)
            teacher = self._once(of_teacher, lambda: load_teacher(cfg.teacher, train.classes, cfg.precision, device))
        if USES_DISCRETIZER[cfg.method]:
            of_discretizer = ("discretizer", repr(cfg.discretizer), repr(cfg.precision), str(device))
            discretizer = self._once(of_discretizer, lambda: load_discretizer(cfg.discretizer.name, cfg.precision, device))
        torch.manual_seed(cfg.seed)  # the student's initial weights
        num_groups = 1 + len({"dad", "aug", "dat"} & set(TERMS[cfg.method]))  # clean images, and those of each attack
        student = build_student(cfg.student, len(train.classes), cfg.augment.img_size, num_groups)
        student = student.to(device)
        if cfg.precision.channels_last:
            student = student.to(memory_format=torch.channels_last)
        _try_one_image(cfg, device, student, teacher, discretizer)
        return Parts(device, train, val, student, teacher, discretizer)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._frozen:
            self._frozen[key] = make()
        return self._frozen[key]


@torch.no_grad()
def _try_one_image(cfg: Config, device: torch.device, student: Student, teacher: Teacher | None, discretizer: Discretizer | None) -> None:
    """A size that a model cannot take shows here, in one line, and not in the first step."""
    side = student.image_size
    pixels = torch.zeros(1, 3, side, side, device=device)
    try:
        student.eval()(pixels)
    except RuntimeError as error:
        what = f"cannot take images of {side} px ({str(error).splitlines()[0]})"
        raise UsageError(f"--student {cfg.student.name} {what}; set --img-size or student.model_kwargs") from None
    if teacher is not None:
        teacher(pixels)
    if discretizer is not None:
        discretizer(pixels)


def _source(cfg: Config, split: str) -> Source:
    return open_source(cfg.data.data_dir, split, cfg.data.class_map, max_bad_share=cfg.data.max_bad_share)


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(f"--device {name}: torch sees no CUDA device; see dad-fast doctor, or use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device
