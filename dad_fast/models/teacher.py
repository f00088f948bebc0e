"""Frozen teachers: pixels in [0, 1] -> logits, whatever stands behind them (open_clip with a zero-shot or fine-tuned head, or timm)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from dad_fast.config.fields import nearest
from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models.student import CLASSES, STUDENT, load_student
from dad_fast.models.weights.files import load_strictly, read_state_dict, sha256_file
from dad_fast.models.zeroshot import imagenet_columns, is_imagenet

log = logging.getLogger(__name__)

TEACHER = "dad_fast.teacher"  # metadata key under which a file names its own architecture
UNKNOWN = "not recorded in the weights"


class Teacher(nn.Module):
    """A frozen classifier: pixels float32 [B, 3, H, W] in [0, 1] -> logits float32 [B, C], CLIP's logit_scale included.

    Differentiable in the pixels, never in the weights. Images of another side than `image_size` are resized inside (bicubic,
    antialiased, differentiable).
    """

    mean: Tensor
    std: Tensor
    head_weight: Tensor
    head_bias: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        head: tuple[Tensor, Tensor] | nn.Module,
        *,
        name: str,
        classes: ClassMap,
        image_size: int,
        mean: Any,
        std: Any,
        precision: PrecisionConfig | None = None,
        unit_features: bool = False,
        provenance: str = UNKNOWN,
        weights_sha256: str | None = None,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        squashed: bool = False,
    ) -> None:
        """crop_pct, interpolation: the evaluation view of an image that belongs to the weights, where they are judged on their own.
        squashed: they were trained on images squashed to a square, as SigLIP's; here images are cropped to one all the same, and said so.
        """
        super().__init__()
        if squashed:
            log.warning(
                "teacher %s was trained on images squashed to a square; here they are cropped to one",
                name,
            )
        self.encoder = encoder  # normalised pixels -> features [B, F]
        self.whole = (
            head if isinstance(head, nn.Module) else None
        )  # normalised pixels -> logits, where the model has its own head
        self.classes, self.name, self.image_size = classes, name, image_size
        self.precision, self.unit_features = precision or PrecisionConfig(), unit_features
        self.provenance, self.weights_sha256 = provenance, weights_sha256
        self.crop_pct, self.interpolation, self.squashed = crop_pct, interpolation, squashed
        self.takes_raw_pixels = (
            False  # whether the normalisation is inside the weights; see savings.fold_normalisation
        )
        weight, bias = (torch.empty(0), torch.empty(0)) if isinstance(head, nn.Module) else head
        self.register_buffer("head_weight", weight)  # [C, F]
        self.register_buffer("head_bias", bias)  # [C]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def train(self, mode: bool = True) -> Teacher:
        """Frozen means frozen: a teacher stays in eval mode."""
        return super().train(False)

    def features(self, pixels: Tensor) -> Tensor:
        """What the head sees, float32 [B, F]: unit image features for a zero-shot head."""
        features = self._run(self.encoder, pixels)
        return F.normalize(features, dim=-1) if self.unit_features else features

    def forward(self, pixels: Tensor) -> Tensor:
        if self.whole is not None:
            return self._run(self.whole, pixels)
        features = self.features(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return F.linear(features, self.head_weight, self.head_bias)

    def _run(self, model: nn.Module, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            pixels = F.interpolate(
                pixels, (self.image_size, self.image_size), mode="bicubic", antialias=True
            )
        dtype = getattr(torch, self.precision.teacher)
        with torch.autocast(
            pixels.device.type, dtype, enabled=self.precision.amp and dtype != torch.float32
        ):
            output: Tensor = model(
                pixels if self.takes_raw_pixels else (pixels - self.mean) / self.std
            )
        return output.float()


class _PreLogits(nn.Module):
    """What a timm model's classifier sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        return features


class _Columns(nn.Module):
    """A model's outputs for some of its classes, in the order of a class map."""

    index: Tensor

    def __init__(self, model: nn.Module, columns: list[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("index", torch.tensor(columns))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).index_select(1, self.index)


def load_teacher(
    cfg: TeacherConfig, classes: ClassMap, precision: PrecisionConfig, device: torch.device
) -> Teacher:
    """The teacher that `cfg.name` says, with one output for each of `classes`.

    open_clip:ARCH/TAG, open_clip:ARCH@FILE, hf-hub:REPO, timm:NAME, timm:NAME@FILE, embedded:NAME, or FILE, a safetensors file that
    names its own architecture in its metadata. Raises UsageError for a name that is none of these, EnvironmentProblem for weights
    that cannot be had, DataError for a file or a class list that does not fit.
    """
    if cfg.name.startswith("timm:"):
        return _from_timm(cfg, classes, precision).to(device)
    if (
        not cfg.name.startswith(("open_clip:", "hf-hub:", "embedded:"))
        and not Path(cfg.name).suffix
        and not Path(cfg.name).is_file()
    ):
        known = "open_clip:ARCH/TAG, open_clip:ARCH@FILE, timm:NAME[@FILE], hf-hub:REPO, embedded:digits"
        raise UsageError(f"--teacher {cfg.name!r}: no such file; write one, or {known}")
    from dad_fast.models.clip_teacher import load_clip_teacher  # a bare checkout has no open_clip

    return load_clip_teacher(cfg, classes, precision, device).to(device)


def check_classes(where: str, metadata: Mapping[str, str], classes: ClassMap) -> None:
    """DataError where the weights' own class list, if their metadata holds one, is not `classes` (by folder, in order)."""
    if CLASSES not in metadata:
        return
    own = ClassMap.from_json(metadata[CLASSES])
    if len(own) != len(classes):
        raise DataError(
            f"{where}: its class list has {len(own)} classes, the data {len(classes)}; give the --class-map it was made with"
        )
    for (number, folder, _), (_, mine, _) in zip(own, classes, strict=True):
        if folder != mine:
            raise DataError(
                f"{where}: its class {number} is {folder!r}, the data's is {mine!r}; give the --class-map it was made with"
            )


def _from_timm(cfg: TeacherConfig, classes: ClassMap, precision: PrecisionConfig) -> Teacher:
    if cfg.head:
        raise UsageError(
            "--teacher-head belongs to open_clip teachers; a timm teacher has its own head"
        )
    arch, _, file = cfg.name.removeprefix("timm:").partition("@")
    if not timm.is_model(arch.partition(".")[0]):
        raise UsageError(
            f"--teacher timm:{arch}: timm has no such model{nearest(arch, timm.list_models())}"
        )
    model, data = _timm_weights(arch, file, classes) if file else _timm_pretrained(arch)
    encoder, outputs = _PreLogits(model), model.num_classes
    if outputs == 1000 and is_imagenet(classes):
        model = _Columns(model, imagenet_columns(classes))
    elif outputs != len(classes):
        raise DataError(
            f"--teacher {cfg.name}: it has {outputs} outputs, the data {len(classes)} classes, which are not ImageNet's wnids"
        )
    return Teacher(
        encoder,
        model,
        name=cfg.name,
        classes=classes,
        image_size=data["input_size"][-1],
        mean=data["mean"],
        std=data["std"],
        precision=precision,
        weights_sha256=sha256_file(file) if file else None,
        crop_pct=data["crop_pct"],
        interpolation=data["interpolation"],
        squashed=data.get("crop_mode") == "squash",
    )


def _timm_pretrained(arch: str) -> tuple[Any, dict[str, Any]]:
    try:
        model = timm.create_model(arch, pretrained=True)
    except (
        Exception
    ) as error:  # RuntimeError where there are no weights, the hub's own errors without a network
        why = " ".join(str(error).split())[:120]
        raise EnvironmentProblem(
            f"--teacher timm:{arch}: its weights cannot be had ({why}); give timm:{arch}@FILE"
        ) from None
    return model, resolve_data_config({}, model=model)


def _timm_weights(arch: str, file: str, classes: ClassMap) -> tuple[Any, dict[str, Any]]:
    state, metadata = read_state_dict(file)
    if STUDENT in metadata:  # a student of ours, which brings its own size and normalisation
        student, _ = load_student(file)
        if student.name != arch:
            raise DataError(
                f"--teacher timm:{arch}@{file}: the file is a {student.name}; write timm:{student.name}@{file}"
            )
        check_classes(f"--teacher {file}", metadata, classes)
        spec = student.spec
        return student.model, {**spec, "input_size": (3, spec["img_size"], spec["img_size"])}
    state = {key.removeprefix("module."): value for key, value in state.items()}
    model = timm.create_model(arch, pretrained=False, num_classes=_num_outputs(arch, state, file))
    load_strictly(model, state, file)
    return model, resolve_data_config({}, model=model)


def _num_outputs(arch: str, state: Mapping[str, Tensor], file: str) -> int:
    """How many classes a file's classifier has, found by the name that timm's configuration gives it."""
    config = timm.get_pretrained_cfg(arch)
    classifier = config.classifier if config is not None and config.classifier else "head"
    key = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if key not in state:
        raise DataError(
            f"--teacher timm:{arch}@{file}: no classifier {key} in it; is it the file of another architecture?"
        )
    return int(state[key].shape[0])
