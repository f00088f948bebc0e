"""Teachers of timm: published weights, a local weights file, or a student of this project."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from dad_fast.config.fields import nearest
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models.heads import FIT_ONE, read_head
from dad_fast.models.student import HUB, read_student
from dad_fast.models.teacher import Head, Teacher, TeacherContext
from dad_fast.models.weights.declared import CLASSES, STUDENT, check_classes
from dad_fast.models.weights.files import read_state_dict, sha256_file
from dad_fast.models.weights.hub import hub_client, reason_of
from dad_fast.models.weights.timm_files import (
    classifier_keys,
    create_timm,
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


class Loaded(NamedTuple):
    """A timm model with its preprocessing by timm's names and the metadata of its file."""

    model: Any
    data: Mapping[str, Any]
    metadata: Metadata


def load_timm(argument: str, context: TeacherContext) -> Teacher:
    """Load `timm:ARCH`, `timm:ARCH@FILE` or `timm:hf-hub:REPO[@REVISION]`; see `load_teacher` for
    the errors.
    """
    from_hub = argument.startswith(HUB)
    arch, _, file = (argument, "", "") if from_hub else argument.partition("@")
    img_size = context.cfg.img_size
    if not from_hub and not timm.is_model(arch.partition(".")[0]):
        raise UsageError(
            f"--teacher timm:{arch}: timm has no such model{nearest(arch, timm.list_models())}"
        )
    if context.shapes_only and not Path(file).is_file():
        num_classes = len(context.classes)
        loaded = _published(arch, img_size, pretrained=False, num_classes=num_classes)
    elif file:
        loaded = _from_file(arch, file, img_size)
    else:
        loaded = _published(arch, img_size, pretrained=True)
    return _teacher(loaded, context, file)


def load_run(file: Path, state: Content, metadata: Metadata, context: TeacherContext) -> Teacher:
    """Make a teacher of a student of this project: the content of its file.

    Raises DataError for a damaged file and for other classes than the data's.
    """
    return _teacher(_from_run(file, state, metadata), context, str(file))


def _teacher(loaded: Loaded, context: TeacherContext, file: str) -> Teacher:
    """Make a teacher of a timm model, with its own head or that of --teacher-head."""
    cfg, classes = context.cfg, context.classes
    model, data, metadata = loaded
    model.eval()
    encoder = PreLogits(model)
    side = data["input_size"][-1]
    unit_features = False
    head: Head
    num_features = _num_features(encoder, side, cfg.name) if cfg.head or cfg.img_size else 0
    if cfg.head and context.shapes_only:
        weight = torch.empty(len(classes), num_features, device=context.device)
        head = weight, weight[:, 0]
    elif cfg.head:
        weight, bias, unit_features = read_head(cfg.head, classes, encoder, num_features, side)
        head = weight, bias
    else:
        # The classes of a dry run have no names.
        known = {} if context.shapes_only else metadata
        head = _own_head(model, known, cfg.name, classes)
    return Teacher(
        encoder,
        head,
        name=cfg.name,
        classes=classes,
        image_size=side,
        mean=data["mean"],
        std=data["std"],
        precision=context.precision,
        unit_features=unit_features,
        weights_sha256=sha256_file(file) if file and not context.shapes_only else None,
        crop_pct=data["crop_pct"],
        interpolation=data["interpolation"],
        squashed=data.get("crop_mode") == "squash",
    )


def _own_head(model: Any, metadata: Metadata, name: str, classes: ClassMap) -> Head:
    """Return the model with its classifier, or why it is none of `classes`.

    ImageNet's classes may be a part of those of the model.
    """
    try:
        check_classes(f"--teacher {name}", metadata, classes)
    except DataError as error:
        return DataError(str(error))
    num_outputs = model.num_classes
    if num_outputs == 1000 and is_imagenet(classes):
        return SelectedClasses(model, imagenet_columns(classes))
    if num_outputs == len(classes):
        return model
    if num_outputs == 0:
        return DataError(f"--teacher {name}: an encoder without a class head; {FIT_ONE}")
    return DataError(
        f"--teacher {name}: it has {num_outputs} outputs, the data {len(classes)} classes, which are "
        "not ImageNet's wnids; take an open_clip model, which needs their names alone (--teacher "
        "open_clip:ViT-L-14/openai), fine-tune one on them (train --preset finetune --method ce -o "
        f"RUN) and write --teacher RUN, or for a head of these classes {FIT_ONE}"
    )


@torch.no_grad()
def _num_features(encoder: nn.Module, side: int, name: str) -> int:
    """Return the length of a feature vector. Raises UsageError for a size that does not fit."""
    device = next(encoder.parameters()).device
    try:
        return int(encoder(torch.zeros(1, 3, side, side, device=device)).shape[1])
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--teacher {name}: cannot take images of {side} px ({reason_of(error)}); set "
            "--teacher-img-size, for a vision transformer to a multiple of its patch size"
        ) from None


def _preprocessing(model: nn.Module, img_size: int) -> dict[str, Any]:
    data = resolve_data_config({}, model=model)
    return {**data, "input_size": (3, img_size, img_size)} if img_size else data


def _published(arch: str, img_size: int, **arguments: Any) -> Loaded:
    """Build a model of timm or of the hub with these `arguments` of timm.create_model."""
    from_hub = arch.startswith(HUB)
    try:
        with hub_client() if from_hub or arguments["pretrained"] else nullcontext():
            model: Any = create_timm(arch, img_size, **arguments)
    except Exception as error:
        # RuntimeError if there are no weights; without a network the hub's client has errors of its
        # own.
        file = f"timm:{'ARCH' if from_hub else arch}@FILE"
        raise EnvironmentProblem(
            f"--teacher timm:{arch}: not available ({reason_of(error)}); give {file}"
        ) from None
    classes = _recorded_classes(model.pretrained_cfg) if from_hub else None
    metadata = {} if classes is None else {CLASSES: classes.to_json()}
    return Loaded(model, _preprocessing(model, img_size), metadata)


def hub_classes(name: str) -> ClassMap | None:
    """Return the classes that `timm:hf-hub:REPO` records in its config.json, if it does.

    None for other names. Raises EnvironmentProblem if the file is not available.
    """
    start = f"timm:{HUB}"
    if not name.startswith(start):
        return None
    try:
        with hub_client():
            found = timm.models.load_model_config_from_hf(name.removeprefix(start))
    except Exception as error:
        # The hub's client has errors of its own, and timm raises anything for a damaged file.
        raise EnvironmentProblem(
            f"{name}: not available ({reason_of(error)}); check the name and the network, or name "
            "a local file: timm:ARCH@FILE"
        ) from None
    return _recorded_classes(found[0])


def _recorded_classes(cfg: Mapping[str, Any]) -> ClassMap | None:
    """Return the classes of timm's `pretrained_cfg`, if it names them."""
    folders = cfg.get("label_names")
    if not isinstance(folders, list | tuple) or not folders:
        return None
    names = cfg.get("label_descriptions")
    names = names if isinstance(names, dict) else {}
    entries = ((i, str(folder), str(names.get(folder, folder))) for i, folder in enumerate(folders))
    return ClassMap(tuple(entries))


def _from_file(arch: str, file: str, img_size: int) -> Loaded:
    state, metadata = read_state_dict(file)
    if STUDENT in metadata:
        loaded = _from_run(Path(file), state, metadata)
        if loaded.data["name"] != arch:
            raise DataError(
                f"--teacher timm:{arch}@{file}: the file is a {loaded.data['name']}; write {file} "
                "alone"
            )
        if img_size not in (0, loaded.data["img_size"]):
            raise UsageError(
                f"--teacher-img-size {img_size}: {file} is a run of this project, which keeps its "
                f"{loaded.data['img_size']} px"
            )
        return loaded

    def build(**arguments: Any) -> Any:
        try:
            return create_timm(arch, img_size, **arguments)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"--teacher timm:{arch}: cannot be built ({reason_of(error)}); see "
                "--teacher-img-size"
            ) from None

    reference = on_meta_device(lambda: build(pretrained=False))
    state = fit_timm(state, reference, file, lambda: create_timm(arch, img_size, pretrained=True))
    # Files of encoders hold no classifier.
    classifier = state.get((classifier_keys(reference) or ["head.weight"])[0])
    num_classes = 0 if classifier is None else classifier.shape[0]
    model = build(pretrained=False, num_classes=num_classes)
    load_fitted(model, state, file)
    return Loaded(model, _preprocessing(model, img_size), metadata)


def _from_run(file: Path, state: Content, metadata: Metadata) -> Loaded:
    """Read a student of this project, which records its own size, normalisation and classes."""
    student = read_student(file, state, metadata)
    side = student.spec["img_size"]
    mode = "squash" if student.squashed else "center"
    data = {**student.spec, "input_size": (3, side, side), "crop_mode": mode}
    return Loaded(student.model, data, metadata)
