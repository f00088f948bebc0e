"""Teachers of timm: published weights, a local weights file, or a student of this project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from dad_fast.config.fields import nearest
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models.student import read_student
from dad_fast.models.teacher import Teacher, TeacherContext
from dad_fast.models.weights.declared import STUDENT, check_classes
from dad_fast.models.weights.files import (
    load_strictly,
    read_state_dict,
    sha256_file,
    strip_wrappers,
)
from dad_fast.models.zeroshot import imagenet_columns, is_imagenet


class PreLogits(nn.Module):
    """Normalised pixels -> input of a timm model's classifier [B, F]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        return features


class SelectedClasses(nn.Module):
    """Logits of some of a model's classes, in the order of a class map."""

    index: Tensor

    def __init__(self, model: nn.Module, columns: list[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("index", torch.tensor(columns))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).index_select(1, self.index)


def load_timm(argument: str, context: TeacherContext) -> Teacher:
    """Load `timm:ARCH` or `timm:ARCH@FILE`; see `load_teacher` for the errors."""
    cfg, classes = context.cfg, context.classes
    if cfg.head:
        raise UsageError(
            "--teacher-head belongs to open_clip teachers; a timm teacher has its own head"
        )
    arch, _, file = argument.partition("@")
    if not timm.is_model(arch.partition(".")[0]):
        raise UsageError(
            f"--teacher timm:{arch}: timm has no such model{nearest(arch, timm.list_models())}"
        )
    if context.shapes_only and not Path(file).is_file():
        model = timm.create_model(arch, pretrained=False, num_classes=len(classes))
        data = resolve_data_config({}, model=model)
    else:
        model, data = _from_file(arch, file, classes) if file else _pretrained(arch)
    encoder, num_outputs = PreLogits(model), model.num_classes
    if num_outputs == 1000 and is_imagenet(classes):
        model = SelectedClasses(model, imagenet_columns(classes))
    elif num_outputs != len(classes):
        raise DataError(
            f"--teacher {cfg.name}: it has {num_outputs} outputs, the data {len(classes)} classes, "
            "which are not ImageNet's wnids"
        )
    return Teacher(
        encoder,
        model,
        name=cfg.name,
        classes=classes,
        image_size=data["input_size"][-1],
        mean=data["mean"],
        std=data["std"],
        precision=context.precision,
        weights_sha256=sha256_file(file) if file and not context.shapes_only else None,
        crop_pct=data["crop_pct"],
        interpolation=data["interpolation"],
        squashed=data.get("crop_mode") == "squash",
    )


def _pretrained(arch: str) -> tuple[Any, dict[str, Any]]:
    try:
        model = timm.create_model(arch, pretrained=True)
    except Exception as error:
        # RuntimeError if there are no weights; without a network the hub's client has errors of its
        # own.
        reason = " ".join(str(error).split())[:120]
        raise EnvironmentProblem(
            f"--teacher timm:{arch}: its weights are not available ({reason}); give "
            f"timm:{arch}@FILE"
        ) from None
    return model, resolve_data_config({}, model=model)


def _from_file(arch: str, file: str, classes: ClassMap) -> tuple[Any, dict[str, Any]]:
    state, metadata = read_state_dict(file)
    # A student of this project records its own size and normalisation.
    if STUDENT in metadata:
        student = read_student(Path(file), state, metadata)
        if student.name != arch:
            raise DataError(
                f"--teacher timm:{arch}@{file}: the file is a {student.name}; write "
                f"timm:{student.name}@{file}"
            )
        check_classes(f"--teacher {file}", metadata, classes)
        spec = student.spec
        return student.model, {**spec, "input_size": (3, spec["img_size"], spec["img_size"])}
    state = strip_wrappers(state)
    model = timm.create_model(arch, pretrained=False, num_classes=_num_outputs(arch, state, file))
    load_strictly(model, state, file)
    return model, resolve_data_config({}, model=model)


def _num_outputs(arch: str, state: Mapping[str, Tensor], file: str) -> int:
    """Return the number of classes of a file's classifier, which timm's configuration names."""
    config = timm.get_pretrained_cfg(arch)
    classifier = config.classifier if config is not None and config.classifier else "head"
    key = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if key not in state:
        raise DataError(
            f"--teacher timm:{arch}@{file}: no classifier {key} in it; is it the file of another "
            "architecture?"
        )
    return int(state[key].shape[0])
