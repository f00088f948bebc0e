"""Frozen teachers: an encoder with a linear head, or a whole classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DadFastError

# A class head: weight [C, F] and bias [C] on the encoder's features; a whole classifier, normalised
# pixels -> logits; or the reason why there is none.
Head: TypeAlias = tuple[Tensor, Tensor] | nn.Module | DadFastError

# Training data of weights that do not record it
UNKNOWN = "not recorded in the weights"


class Teacher(nn.Module):
    """Frozen classifier: pixels float32 [B, 3, H, W] in [0, 1] -> logits float32 [B, C].

    Logits of CLIP include its logit_scale.

    Differentiable in the pixels, not in the weights. Images of another size than `image_size` are
    resized inside (bicubic, antialiased, differentiable). An encoder without a class head has
    features alone.
    """

    mean: Tensor
    std: Tensor
    head_weight: Tensor
    head_bias: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        head: Head,
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
        """Freeze `encoder` under a `head`.

        encoder: normalised pixels -> features [B, F]. crop_pct, interpolation: evaluation view that
        belongs to the weights. squashed: that view is the whole image squashed to a square, as
        SigLIP's, instead of a centre crop.
        """
        super().__init__()
        self.encoder = encoder
        self.classes = classes
        self.name = name
        self.image_size = image_size
        self.precision = precision or PrecisionConfig()
        self.unit_features = unit_features
        self.provenance = provenance
        self.weights_sha256 = weights_sha256
        self.crop_pct = crop_pct
        self.interpolation = interpolation
        self.squashed = squashed
        # True once `optimizations.fold_normalisation` has moved mean and std into the weights
        self.takes_raw_pixels = False
        # Normalised pixels -> logits, for a model with its own head
        self.whole: nn.Module | None = None
        self._headless: DadFastError | None = None
        weight = bias = torch.empty(0)
        if isinstance(head, nn.Module):
            self.whole = head
        elif isinstance(head, DadFastError):
            self._headless = head
        else:
            weight, bias = head
        self.register_buffer("head_weight", weight)  # [C, F]
        self.register_buffer("head_bias", bias)  # [C]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def view(self) -> View:
        """Return the evaluation view that belongs to the weights."""
        return View(self.image_size, self.crop_pct, self.interpolation, self.squashed)

    @property
    def members(self) -> list[Teacher]:
        """The teachers that this one consists of: those of an ensemble, else itself."""
        return [self]

    @property
    def has_head(self) -> bool:
        return self._headless is None

    def check_head(self) -> None:
        """Raise the reason why there is no class head, if there is none."""
        if self._headless is not None:
            raise self._headless

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the input of the head, float32 [B, F], normalised for a zero-shot head."""
        features = self._run(self.encoder, pixels)
        return F.normalize(features, dim=-1) if self.unit_features else features

    def forward(self, pixels: Tensor) -> Tensor:
        self.check_head()
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
        enabled = bool(self.precision.amp) and dtype != torch.float32
        with torch.autocast(pixels.device.type, dtype, enabled=enabled):
            x = pixels if self.takes_raw_pixels else (pixels - self.mean) / self.std
            output: Tensor = model(x)
        return output.float()


@dataclass(frozen=True, kw_only=True)
class TeacherContext:
    """Arguments of a teacher's factory, next to the argument after the name's colon."""

    cfg: TeacherConfig  # name is the whole of --teacher
    classes: ClassMap  # one output each, in this order
    precision: PrecisionConfig
    device: torch.device
    shapes_only: bool = False  # build the architecture: read no weights, download nothing
