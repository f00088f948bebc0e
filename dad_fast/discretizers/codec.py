"""Lossy image formats as discretizers, with no learned part: jpeg:QUALITY and webp:QUALITY."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from dad_fast.discretizers.base import NOT_TRAINED, Discretized, Discretizer, LoadContext
from dad_fast.discretizers.registry import check_argument
from dad_fast.errors import EnvironmentProblem


class Codec(Discretizer):
    """Compression by Pillow on the host: "JPEG" (4:2:0) or "WEBP" (lossy), quality 1 to 100."""

    provenance = NOT_TRAINED

    def __init__(self, form: str, quality: int) -> None:
        self.form = form
        self.quality = quality
        self.name = f"{form.lower()}:{quality}"

    def __call__(self, pixels: Tensor) -> Discretized:
        levels = (pixels.detach().clamp(0, 1) * 255).round().to(torch.uint8)
        # [B, H, W, 3]
        levels = levels.permute(0, 2, 3, 1).cpu()
        decoded = np.stack([self._round_trip(image) for image in levels.numpy()])
        images = torch.from_numpy(decoded).to(pixels.device).permute(0, 3, 1, 2).float().div(255.0)
        return Discretized(images.contiguous(), None)

    def _round_trip(self, levels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(levels).save(file, self.form, quality=self.quality)
        return np.asarray(Image.open(file).convert("RGB"))


def load_jpeg(argument: str, context: LoadContext) -> Codec:
    """Load `jpeg:QUALITY`. Raises UsageError for a quality that is not from 1 to 100."""
    check_argument("jpeg", argument, context.text)
    return Codec("JPEG", int(argument))


def load_webp(argument: str, context: LoadContext) -> Codec:
    """Load `webp:QUALITY`.

    Raises UsageError for a quality that is not from 1 to 100, EnvironmentProblem for a Pillow
    without WebP.
    """
    check_argument("webp", argument, context.text)
    if not features.check("webp"):
        raise EnvironmentProblem(
            f"--discretizer {context.text}: this Pillow was built without WebP; install another "
            "build of pillow, or use jpeg:QUALITY"
        )
    return Codec("WEBP", int(argument))
