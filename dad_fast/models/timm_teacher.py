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
from dad_fast.models.weights.files import read_state_dict, sha256_file
from dad_fast.models.weights.hub import hub_client, reason_of
from dad_fast.models.weights.timm_files import (
    classifier_keys,
    fit_timm,
    load_fitted,
    on_meta_device,
)
from dad_fast.models.zeroshot import imagenet_columns, is_imagenet

Content = Mapping[str, Tensor]
Metadata = Mapping[str, str]


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
    classes = context.classes
    _refuse_head(context)
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
    return _teacher(model, data, context, file)


def load_run(file: Path, state: Content, metadata: Metadata, context: TeacherContext) -> Teacher:
    """Make a teacher of a student of this project: the content of its file.

    Raises DataError for a damaged file and for other classes than the data's.
    """
    _refuse_head(context)
    model, data = _from_run(file, state, metadata, context.classes)
    return _teacher(model, data, context, str(file))


def _refuse_head(context: TeacherContext) -> None:
    if context.cfg.head:
        raise UsageError(
            "--teacher-head belongs to open_clip teachers; a timm teacher has its own head"
        )


def _teacher(model: Any, data: Mapping[str, Any], context: TeacherContext, file: str) -> Teacher:
    """Make a teacher of a timm model and its preprocessing; ImageNet's classes may be a part."""
    name, classes = context.cfg.name, context.classes
    encoder, num_outputs = PreLogits(model), model.num_classes
    if num_outputs == 1000 and is_imagenet(classes):
        model = SelectedClasses(model, imagenet_columns(classes))
    elif num_outputs != len(classes):
        raise DataError(
            f"--teacher {name}: it has {num_outputs} outputs, the data {len(classes)} classes, "
            "which are not ImageNet's wnids; take an open_clip model, which needs their names alone "
            "(--teacher open_clip:ViT-L-14/openai), or fine-tune one on them (train --preset "
            "finetune --method ce -o RUN) and write --teacher RUN"
        )
    return Teacher(
        encoder,
        model,
        name=name,
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
        with hub_client():
            model = timm.create_model(arch, pretrained=True)
    except Exception as error:
        # RuntimeError if there are no weights; without a network the hub's client has errors of its
        # own.
        raise EnvironmentProblem(
            f"--teacher timm:{arch}: its weights are not available ({reason_of(error)}); give "
            f"timm:{arch}@FILE"
        ) from None
    return model, resolve_data_config({}, model=model)


def _from_file(arch: str, file: str, classes: ClassMap) -> tuple[Any, dict[str, Any]]:
    state, metadata = read_state_dict(file)
    if STUDENT in metadata:
        model, spec = _from_run(Path(file), state, metadata, classes)
        if spec["name"] != arch:
            raise DataError(
                f"--teacher timm:{arch}@{file}: the file is a {spec['name']}; write {file} alone"
            )
        return model, spec
    reference = on_meta_device(lambda: timm.create_model(arch, pretrained=False))
    state = fit_timm(state, reference, file, lambda: timm.create_model(arch, pretrained=True))
    num_outputs = _num_outputs(arch, classifier_keys(reference) or ["head.weight"], state, file)
    model = timm.create_model(arch, pretrained=False, num_classes=num_outputs)
    load_fitted(model, state, file)
    return model, resolve_data_config({}, model=model)


def _from_run(
    file: Path, state: Content, metadata: Metadata, classes: ClassMap
) -> tuple[Any, dict[str, Any]]:
    """Read a student of this project, which records its own size, normalisation and classes."""
    student = read_student(file, state, metadata)
    check_classes(f"--teacher {file}", metadata, classes)
    spec = student.spec
    return student.model, {**spec, "input_size": (3, spec["img_size"], spec["img_size"])}


def _num_outputs(arch: str, head: list[str], state: Mapping[str, Tensor], file: str) -> int:
    """Return the number of classes of a file's classifier, of which `head` are the keys."""
    missing = [key for key in head if key not in state]
    if missing:
        raise DataError(
            f"--teacher timm:{arch}@{file}: no classifier {missing[0]} in it: a backbone alone, or "
            "the file of another architecture; give one with its classifier"
        )
    return int(state[head[0]].shape[0])
