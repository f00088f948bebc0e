"""Models to evaluate: a run's student, or a model of timm or open_clip by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dad_fast.config.schema import Config
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError
from dad_fast.models.load_student import load_student, take_view
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.places import checkpoint_file, run_settings
from dad_fast.models.registry import names_teacher
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher
from dad_fast.models.weights.declared import CLASSES, recorded_classes
from dad_fast.models.weights.files import sha256_file


@dataclass(frozen=True, eq=False)
class EvalModel:
    """A loaded model: pixels float32 [B, 3, H, W] in [0, 1] -> logits [B, C], C = len(classes).

    name: as given by the user. facts: for the JSON record.
    """

    name: str
    title: str
    model: Student | Teacher
    classes: ClassMap
    view: View
    facts: Mapping[str, Any] = field(default_factory=dict)


def load_subject(
    name: str, cfg: Config, data_classes: Callable[[], ClassMap], device: torch.device
) -> EvalModel:
    """Load a student (a run's folder, a checkpoint's folder or a file) or a name for `--teacher`.

    A run has recorded its classes; a published model takes `data_classes()`, those of the data.

    Raises DataError and UsageError as the loaders do, and for a run that recorded no classes.
    """
    if names_teacher(name):
        named = replace(cfg.teacher, name=name)
        temperature = cfg.loss.temperature
        teacher = load_teacher(
            named, data_classes(), cfg.precision, device, temperature=temperature
        )
        return of_teacher(teacher)
    path = checkpoint_file(name)
    student, metadata = load_student(path)
    take_view(student, run_settings(path)[0])
    classes = recorded_classes(path, metadata.get(CLASSES), student.num_classes)
    _check_same(path, classes, cfg.data.class_map)
    method = metadata.get("dad_fast.method", "")
    ema = metadata.get("dad_fast.ema", "") == "true"
    title = f"{path}: {student.name}"
    title += f" by {method}" if method else ""
    title += ", EMA" if ema else ""
    title += f", calibrated ({student.calibration})" if student.calibration else ""
    facts = {
        "path": str(path),
        "sha256": sha256_file(path),
        "student": student.name,
        "method": method,
        "ema": ema,
        "num_parameters": sum(parameter.numel() for parameter in student.parameters()),
        "temperature": student.calibration and student.calibration.temperature,
    }
    return EvalModel(name, title, student.to(device), classes, student.view, facts)


def of_teacher(teacher: Teacher) -> EvalModel:
    """Wrap a loaded teacher."""
    facts = {
        "name": teacher.name,
        "sha256": teacher.weights_sha256,
        "seen": teacher.provenance,
        "squashed": teacher.squashed,
    }
    return EvalModel(teacher.name, teacher.name, teacher, teacher.classes, teacher.view, facts)


def _check_same(weights: Path, classes: ClassMap, class_map: str) -> None:
    """Raise DataError for a `--class-map` that differs from the recorded classes."""
    if not class_map:
        return
    given = ClassMap.from_csv(class_map)
    for number, (ours, theirs) in enumerate(zip(classes.folders, given.folders, strict=False)):
        if ours != theirs:
            raise DataError(
                f"--class-map {class_map}: class {number} is {theirs!r}, but {ours!r} in "
                f"{weights}; leave --class-map out"
            )
    if len(classes) != len(given):
        raise DataError(
            f"--class-map {class_map}: {len(given)} classes, but {len(classes)} in {weights}; "
            "leave --class-map out"
        )
