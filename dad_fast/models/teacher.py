"""Frozen teachers: pixels in [0, 1] -> logits, whatever stands behind them (open_clip with a zero-shot or fine-tuned head, or timm)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models.weights import asset, load_strictly, read_state_dict, sha256_file
from dad_fast.models.zeroshot import imagenet_columns, is_imagenet, prompt_names, resolve_templates, zero_shot_head

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
        head: tuple[Tensor, Tensor] | None,
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
    ) -> None:
        super().__init__()
        self.encoder = encoder  # pixels, normalised -> features [B, F], or logits where head is None
        self.classes, self.name, self.image_size = classes, name, image_size
        self.precision, self.unit_features = precision or PrecisionConfig(), unit_features
        self.provenance, self.weights_sha256 = provenance, weights_sha256
        weight, bias = head if head is not None else (torch.empty(0), torch.empty(0))
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
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            pixels = F.interpolate(pixels, (self.image_size, self.image_size), mode="bicubic", antialias=True)
        dtype = getattr(torch, self.precision.teacher)
        with torch.autocast(pixels.device.type, dtype, enabled=self.precision.amp and dtype != torch.float32):
            features = self.encoder((pixels - self.mean) / self.std).float()
        return F.normalize(features, dim=-1) if self.unit_features else features

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.features(pixels)
        if not self.head_weight.numel():
            return features
        with torch.autocast(pixels.device.type, enabled=False):
            return F.linear(features, self.head_weight, self.head_bias)


class _ImageTower(nn.Module):
    """CLIP's image tower and projection, without the text tower, which is not needed once the head is made."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.visual(x)
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


def load_teacher(cfg: TeacherConfig, classes: ClassMap, precision: PrecisionConfig, device: torch.device) -> Teacher:
    """The teacher that `cfg.name` says, with one output for each of `classes`.

    open_clip:ARCH/TAG, open_clip:ARCH@FILE, hf-hub:REPO, timm:NAME, timm:NAME@FILE, embedded:NAME, or FILE, a safetensors file that
    names its own architecture in its metadata. Raises UsageError for a name that is none of these, EnvironmentProblem for weights
    that cannot be had, DataError for a file or a class list that does not fit.
    """
    name = cfg.name
    if name.startswith("open_clip:"):
        arch, at, file = name.removeprefix("open_clip:").partition("@")
        teacher = _from_open_clip(cfg, arch, file, classes, precision, device) if at else _from_tag(cfg, arch, classes, precision, device)
    elif name.startswith("hf-hub:"):
        teacher = _from_tag(cfg, name, classes, precision, device)
    elif name.startswith("timm:"):
        teacher = _from_timm(cfg, name.removeprefix("timm:"), classes, precision)
    else:
        teacher = _from_file(cfg, classes, precision, device)
    return teacher.to(device)


def _from_file(cfg: TeacherConfig, classes: ClassMap, precision: PrecisionConfig, device: torch.device) -> Teacher:
    import open_clip

    embedded = cfg.name.startswith("embedded:")
    path = asset(f"{cfg.name.removeprefix('embedded:')}-clip.safetensors") if embedded else cfg.name
    state, metadata = read_state_dict(path)
    if TEACHER not in metadata:
        raise DataError(f"--teacher {path}: the file does not name its architecture; write open_clip:ARCH@{path} or timm:NAME@{path}")
    try:
        described = json.loads(metadata[TEACHER])
        clip = open_clip.CLIP(**described["model_cfg"])
        context = described["model_cfg"]["text_cfg"]["context_length"]
        mean, std = described["mean"], described["std"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--teacher {path}: its metadata {TEACHER} is damaged ({type(error).__name__}: {error})") from None
    load_strictly(clip, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, path)
    return _clip_teacher(
        cfg, clip, open_clip.SimpleTokenizer(context_length=context), classes, precision, device, mean, std,
        own_templates=described.get("templates", ()), provenance=described.get("seen", UNKNOWN), sha256=sha256_file(path),
    )  # fmt: skip


def _from_open_clip(
    cfg: TeacherConfig, arch: str, file: str, classes: ClassMap, precision: PrecisionConfig, device: torch.device
) -> Teacher:
    import open_clip

    config = _known_arch(arch)
    state, _ = read_state_dict(file)
    clip = open_clip.create_model(arch, pretrained=None, load_weights=False)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    # Buffers that some files leave out and others carry: positions of the text tower, made anew by the model.
    own = clip.state_dict()
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if k in own or not k.endswith("position_ids")}
    load_strictly(clip, state, file)
    gelu = "QuickGELU" if config.get("quick_gelu") else "GELU"
    log.warning("teacher %s: architecture %s with %s, as named; OpenAI's own weights need an ARCH-quickgelu", file, arch, gelu)
    preprocess = clip.visual.preprocess_cfg
    return _clip_teacher(
        cfg, clip, open_clip.get_tokenizer(arch), classes, precision, device, preprocess["mean"], preprocess["std"],
        sha256=sha256_file(file),
    )  # fmt: skip


def _from_tag(cfg: TeacherConfig, arch: str, classes: ClassMap, precision: PrecisionConfig, device: torch.device) -> Teacher:
    import open_clip

    tag, quick_gelu = None, False
    if not arch.startswith("hf-hub:"):
        arch, _, tag = arch.partition("/")
        config = _known_arch(arch)
        known = open_clip.get_pretrained_cfg(arch, tag)
        if not known:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)[:6])
            raise UsageError(f"--teacher {cfg.name}: {arch} has no weights {tag!r}; it has {tags}; or write open_clip:{arch}@FILE")
        # The activation belongs to the weights: with the other one CLIP is silently several points worse.
        quick_gelu = bool(known.get("quick_gelu"))
        if config.get("quick_gelu") and not quick_gelu:
            raise UsageError(f"--teacher {cfg.name}: these weights use GELU; write open_clip:{arch.removesuffix('-quickgelu')}/{tag}")
    try:
        clip = open_clip.create_model(arch, pretrained=tag, force_quick_gelu=quick_gelu, require_pretrained=True)
    except Exception as error:  # open_clip, the hub's client and urllib each have their own errors
        why = " ".join(str(error).split())[:120]
        raise EnvironmentProblem(f"--teacher {cfg.name}: its weights cannot be had ({why}); give a local file: open_clip:ARCH@FILE") from None
    preprocess = clip.visual.preprocess_cfg
    return _clip_teacher(cfg, clip, open_clip.get_tokenizer(arch), classes, precision, device, preprocess["mean"], preprocess["std"])


def _known_arch(arch: str) -> dict[str, Any]:
    import difflib

    import open_clip

    config = open_clip.get_model_config(arch)
    if config is None:
        near = difflib.get_close_matches(arch, open_clip.list_models(), n=1)
        hint = f"did you mean {near[0]}?" if near else "see open_clip.list_models()"
        raise UsageError(f"--teacher open_clip:{arch}: open_clip has no such architecture; {hint}")
    return dict(config)


def _clip_teacher(
    cfg: TeacherConfig,
    clip: nn.Module,
    tokenizer: Any,
    classes: ClassMap,
    precision: PrecisionConfig,
    device: torch.device,
    mean: Any,
    std: Any,
    own_templates: Any = (),
    provenance: str = UNKNOWN,
    sha256: str | None = None,
) -> Teacher:
    clip = clip.eval().to(device)
    size = clip.visual.image_size
    if cfg.head:
        head = _read_head(cfg.head, classes)
    else:
        weight = zero_shot_head(clip, tokenizer, prompt_names(classes), resolve_templates(cfg.templates, classes, own_templates))
        bias = getattr(clip, "logit_bias", None)  # SigLIP's
        shift = 0.0 if bias is None else float(bias)
        head = (weight * clip.logit_scale.detach().exp().float(), torch.full((len(classes),), shift, device=weight.device))
    return Teacher(
        _ImageTower(clip.visual), head, name=cfg.name, classes=classes, image_size=size[0] if isinstance(size, (tuple, list)) else size,
        mean=mean, std=std, precision=precision, unit_features=not cfg.head, provenance=provenance, weights_sha256=sha256,
    )  # fmt: skip


def _read_head(path: str, classes: ClassMap) -> tuple[Tensor, Tensor]:
    """A fine-tuned linear head on image features as they are: weight [C, F], bias [C] or none, and perhaps its class list."""
    state, metadata = read_state_dict(path)
    if "weight" not in state or state["weight"].ndim != 2:
        raise DataError(f"--teacher-head {path}: needs a tensor weight [classes, features], and optionally bias [classes]")
    weight = state["weight"].float()
    if weight.shape[0] != len(classes):
        raise DataError(f"--teacher-head {path}: it has {weight.shape[0]} outputs, the data {len(classes)} classes; give a --class-map")
    _same_classes(path, metadata, classes)
    return weight, state.get("bias", torch.zeros(len(classes))).float()


def _same_classes(path: str, metadata: Mapping[str, str], classes: ClassMap) -> None:
    if "dad_fast.classes" not in metadata:
        return
    for own, (number, folder, _) in zip(ClassMap.from_json(metadata["dad_fast.classes"]), classes, strict=True):
        if own[1] != folder:
            raise DataError(f"{path}: its class {number} is {own[1]!r}, the data's is {folder!r}; give the --class-map it was made with")


def _from_timm(cfg: TeacherConfig, name: str, classes: ClassMap, precision: PrecisionConfig) -> Teacher:
    if cfg.head:
        raise UsageError("--teacher-head belongs to open_clip teachers; a timm teacher has its own head")
    arch, _, file = name.partition("@")
    if not timm.is_model(arch.partition(".")[0]):
        raise UsageError(f"--teacher timm:{arch}: timm has no such model; see timm.list_models()")
    if file:
        state, metadata = read_state_dict(file)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        model = timm.create_model(arch, pretrained=False, num_classes=_num_outputs(arch, state, file))
        load_strictly(model, state, file)
        if "dad_fast.classes" in metadata:
            _same_classes(file, metadata, classes)
    else:
        try:
            model = timm.create_model(arch, pretrained=True)
        except Exception as error:  # RuntimeError without weights, the hub's own errors without a network
            why = " ".join(str(error).split())[:120]
            raise EnvironmentProblem(f"--teacher {cfg.name}: its weights cannot be had ({why}); give timm:{arch}@FILE") from None
    outputs = model.num_classes
    if outputs == 1000 and is_imagenet(classes):
        model = _Columns(model, imagenet_columns(classes))
    elif outputs != len(classes):
        raise DataError(f"--teacher {cfg.name}: it has {outputs} outputs, the data {len(classes)} classes, and they are not ImageNet's wnids")
    data = resolve_data_config({}, model=model.model if isinstance(model, _Columns) else model)
    return Teacher(
        model, None, name=cfg.name, classes=classes, image_size=data["input_size"][-1], mean=data["mean"], std=data["std"],
        precision=precision, weights_sha256=sha256_file(file) if file else None,
    )  # fmt: skip


def _num_outputs(arch: str, state: Mapping[str, Tensor], file: str) -> int:
    """How many classes a file's classifier has, found by the name that timm's configuration gives it."""
    config = timm.get_pretrained_cfg(arch)
    classifier = config.classifier if config is not None and config.classifier else "head"
    key = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if key not in state:
        raise DataError(f"--teacher timm:{arch}@{file}: no classifier {key} in it; is it the file of another architecture?")
    return int(state[key].shape[0])
