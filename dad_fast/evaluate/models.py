"""What is judged: a run's student, or any model of timm or open_clip by name; each with its own view of an image and its class list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dad_fast.config.schema import Config
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError
from dad_fast.models.load_student import load_student
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.student import checkpoint_file
from dad_fast.models.teacher import Teacher
from dad_fast.models.weights.declared import CLASSES
from dad_fast.models.weights.files import sha256_file

BY_NAME = ("timm:", "open_clip:", "hf-hub:", "embedded:")


@dataclass(frozen=True, eq=False)
class EvalModel:
    """A loaded model: pixels float32 [B, 3, H, W] in [0, 1] -> logits [B, C], C the length of `classes`."""

    name: str  # as it was named
    title: str
    model: nn.Module
    classes: ClassMap
    view: tuple[int, float, str]  # size, share of the resized image kept, filter
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the record


def is_by_name(name: str) -> bool:
    """Whether a model is named as teachers are, and not by a run's folder or file."""
    return name.startswith(BY_NAME)


def load_subject(
    name: str, cfg: Config, data_classes: Callable[[], ClassMap], device: torch.device
) -> EvalModel:
    """The model `name`: a run's folder, a checkpoint's folder or a file of a student, or timm:, open_clip:, hf-hub: and embedded: as
    `--teacher` takes them. The classes of a run are those it recorded; of a published model those of the data that it is judged on.

    Raises DataError and UsageError as the loaders do, and where a run recorded no classes.
    """
    if is_by_name(name):
        return of_teacher(
            load_teacher(replace(cfg.teacher, name=name), data_classes(), cfg.precision, device)
        )
    path = checkpoint_file(name)
    student, metadata = load_student(path)
    classes = recorded_classes(path, metadata, cfg.data.class_map)
    facts = {
        "method": metadata.get("dad_fast.method", ""),
        "ema": metadata.get("dad_fast.ema", "") == "true",
    }
    title = (
        f"{path}: {student.name}"
        + (f" by {facts['method']}" if facts["method"] else "")
        + (", EMA" if facts["ema"] else "")
    )
    view = (student.image_size, student.crop_pct, student.interpolation)
    facts = {"path": str(path), "sha256": sha256_file(path), "student": student.name, **facts}
    return EvalModel(name, title, student.to(device), classes, view, facts)


def of_teacher(teacher: Teacher) -> EvalModel:
    facts = {
        "name": teacher.name,
        "sha256": teacher.weights_sha256,
        "seen": teacher.provenance,
        "squashed": teacher.squashed,
    }
    view = (teacher.image_size, teacher.crop_pct, teacher.interpolation)
    return EvalModel(teacher.name, teacher.name, teacher, teacher.classes, view, facts)


def recorded_classes(weights: Path, metadata: Mapping[str, str], class_map: str) -> ClassMap:
    """The classes of a student's outputs, in their order; `--class-map` may only say the same."""
    if CLASSES not in metadata:
        raise DataError(
            f"{weights}: no class list in its metadata, so its outputs have no meaning; was it written by dad-fast?"
        )
    classes = ClassMap.from_json(metadata[CLASSES])
    if class_map:
        given = ClassMap.from_csv(class_map)
        for number, (ours, theirs) in enumerate(zip(classes.folders, given.folders, strict=False)):
            if ours != theirs:
                raise DataError(
                    f"--class-map {class_map}: class {number} is {theirs!r}, but {ours!r} in {weights}; leave --class-map out"
                )
        if len(classes) != len(given):
            raise DataError(
                f"--class-map {class_map}: {len(given)} classes, but {len(classes)} in {weights}; leave --class-map out"
            )
    return classes
