"""JPEG compression as a discretizer, with no learned part."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dad_fast.discretizers.base import Discretized, Discretizer, LoadContext
from dad_fast.errors import UsageError


class Jpeg(Discretizer):
    """JPEG compression (4:2:0) by Pillow on the host."""

    provenance = "nothing: it is not trained"

    def __init__(self, quality: int) -> None:
        self.quality = quality
        self.name = f"jpeg:{quality}"

    def __call__(self, pixels: Tensor) -> Discretized:
        levels = (pixels.detach().clamp(0, 1) * 255).round().to(torch.uint8)
        # [B, H, W, 3]
        levels = levels.permute(0, 2, 3, 1).cpu()
        decoded = np.stack([self._round_trip(image) for image in levels.numpy()])
        images = torch.from_numpy(decoded).to(pixels.device).permute(0, 3, 1, 2).float().div(255.0)
        return Discretized(images.contiguous(), None)

    def _round_trip(self, levels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file))


def load(argument: str, context: LoadContext) -> Jpeg:
    """Load `jpeg:QUALITY`. Raises UsageError for a quality that is not from 1 to 100."""
    if not argument.isdecimal() or not 1 <= int(argument) <= 100:
        raise UsageError(
            f"--discretizer {context.text}: write jpeg:QUALITY with a quality from 1 to 100, such "
            "as jpeg:75"
        )
    return Jpeg(int(argument))
