"""Teachers of open_clip: the image tower of a CLIP under a zero-shot, fine-tuned or probe head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dad_fast.data.classes import ClassMap
from dad_fast.errors import DadFastError, DataError, EnvironmentProblem
from dad_fast.models.clip_weights import (
    Clip,
    clip_from_hub,
    clip_from_own_file,
    clip_from_tag,
    clip_from_weights,
    clip_without_weights,
)
from dad_fast.models.heads import LinearHead, read_head
from dad_fast.models.teacher import Teacher, TeacherContext
from dad_fast.models.weights.files import asset, read_state_dict
from dad_fast.models.zeroshot import check_distinct, prompt_names, resolve_templates, zero_shot_head


def load_open_clip(argument: str, context: TeacherContext) -> Teacher:
    """Load `open_clip:ARCH/TAG` or `open_clip:ARCH@FILE`; see `load_teacher` for the errors."""
    arch, at, file = argument.partition("@")
    if context.shapes_only:
        return _teacher(clip_without_weights(context.cfg.name, arch.partition("/")[0]), context)
    if at:
        return _teacher(clip_from_weights(arch, file), context)
    arch, _, tag = arch.partition("/")
    return _teacher(clip_from_tag(context.cfg.name, arch, tag), context)


def load_hub(argument: str, context: TeacherContext) -> Teacher:
    """Load `hf-hub:REPO`; see `load_teacher` for the errors."""
    name = context.cfg.name
    load = clip_without_weights if context.shapes_only else clip_from_hub
    return _teacher(load(name, name), context)


def load_embedded(argument: str, context: TeacherContext) -> Teacher:
    """Load `embedded:NAME`. Raises UsageError if no such file is embedded."""
    path = asset(f"{argument}-clip.safetensors")
    return load_own_clip(path, *read_state_dict(path), context)


def load_own_clip(
    path: Path, state: dict[str, Tensor], metadata: Mapping[str, str], context: TeacherContext
) -> Teacher:
    """Make a teacher of the content of a file with its CLIP as metadata. Raises DataError."""
    return _teacher(clip_from_own_file(path, state, metadata), context)


def _teacher(clip: Clip, context: TeacherContext) -> Teacher:
    """Make a teacher of a CLIP, with the head of --teacher-head or a zero-shot head."""
    cfg, classes = context.cfg, context.classes
    model: Any = clip.model.eval().to(context.device)
    tower = ImageTower(model.visual)
    side = tower.side
    head: LinearHead | DadFastError
    if context.shapes_only:
        weight = torch.empty(len(classes), tower.num_features(), device=context.device)
        head = LinearHead(weight, weight[:, 0], not cfg.head)
    elif cfg.head:
        head = read_head(cfg.head, classes, tower, tower.num_features(), side)
    else:
        try:
            head = _zero_shot(clip, model, classes, cfg.templates)
        except (DataError, EnvironmentProblem) as error:
            # A linear probe with the data's labels needs the encoder alone. A new error, without
            # the traceback, which would keep the text tower in memory.
            head = type(error)(str(error))
    # open_clip's "random" is a setting for training.
    is_bilinear = clip.preprocess["interpolation"] == "bilinear"
    return Teacher(
        tower,
        head[:2] if isinstance(head, LinearHead) else head,
        name=cfg.name,
        classes=classes,
        image_size=side,
        mean=clip.preprocess["mean"],
        std=clip.preprocess["std"],
        precision=context.precision,
        # As of a zero-shot head, where there is none.
        unit_features=head.unit_features if isinstance(head, LinearHead) else True,
        provenance=clip.provenance,
        weights_sha256=clip.sha256,
        interpolation="bilinear" if is_bilinear else "bicubic",
        squashed=clip.preprocess["resize_mode"] == "squash",
    )


class ImageTower(nn.Module):
    """CLIP's image tower and projection, without the text tower."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual: Any = visual

    @property
    def side(self) -> int:
        """Side of its images in pixels."""
        size = self.visual.image_size
        return int(size[0] if isinstance(size, (tuple, list)) else size)

    @torch.no_grad()
    def num_features(self) -> int:
        """Length of a feature vector, from a run on one black image."""
        device = next(self.parameters()).device
        return self(torch.zeros(1, 3, self.side, self.side, device=device)).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        features = self.visual(x)
        # CoCa's tower returns its tokens too.
        return features[0] if isinstance(features, tuple) else features


def _zero_shot(
    clip: Clip, model: Any, classes: ClassMap, templates: str | Sequence[str]
) -> LinearHead:
    """Return weight [C, F] times logit_scale, and bias [C]: SigLIP's logit_bias, else 0."""
    prompts = resolve_templates(templates, classes, clip.templates)
    weight = zero_shot_head(model, clip.tokenizer, prompt_names(classes), prompts)
    check_distinct(weight, classes)
    weight = weight * model.logit_scale.detach().exp().float()
    logit_bias = getattr(model, "logit_bias", None)
    bias = torch.full((len(classes),), 0.0 if logit_bias is None else float(logit_bias))
    return LinearHead(weight, bias, True)
