"""Plain resizing as a discretizer: the blur of an autoencoder, without codes or learned parts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dad_fast.discretizers.base import NOT_TRAINED, Discretized, Discretizer, LoadContext
from dad_fast.discretizers.registry import check_argument


class Blur(Discretizer):
    """Shrink by `factor` (bilinear, antialiased) and enlarge again (bicubic)."""

    provenance = NOT_TRAINED

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.name = f"blur:{factor:g}"

    def __call__(self, pixels: Tensor) -> Discretized:
        sides = pixels.shape[-2:]
        smaller = [max(1, round(side / self.factor)) for side in sides]
        x = F.interpolate(pixels.detach().float(), smaller, mode="bilinear", antialias=True)
        x = F.interpolate(x, sides, mode="bicubic")
        # Bicubic overshoots at edges.
        return Discretized(x.clamp(0.0, 1.0), None)


def load(argument: str, context: LoadContext) -> Blur:
    """Load `blur:FACTOR`. Raises UsageError for a factor that is not above 1 and up to 64."""
    check_argument("blur", argument, context.text)
    return Blur(float(argument))
