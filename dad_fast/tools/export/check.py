"""Compare an exported model, read back from its file, with the student on random and image-like
pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dad_fast.errors import DadFastError
from dad_fast.models.student import Student

TOLERANCE = 1e-4  # of the largest logit; other kernels sum in another order


def check_pixels(side: int) -> list[Tensor]:
    """Return batches of 1 and 5 images [B, 3, side, side] in [0, 1]: noise; smooth colours in 8
    bits, with noise, black, white.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, side, side, generator=generator)
    coarse = torch.rand(2, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False).clamp(
        0, 1
    )
    smooth[1] = (0.9 * smooth[1] + 0.1 * noise[1]).clamp(0, 1)
    flat = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, side, side)
    return [noise[:1], torch.cat((noise[1:], (255 * smooth).round() / 255, flat)).contiguous()]


@torch.no_grad()
def reference(student: Student) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of pixels and the student's own logits.

    Raises DadFastError if they are not finite.
    """
    pairs = [(pixels, student(pixels)) for pixels in check_pixels(student.image_size)]
    if not all(logits.isfinite().all() for _, logits in pairs):
        raise DadFastError(
            f"{student.name}: its logits are not finite, so nothing is exported; check the run's "
            "losses"
        )
    return pairs


@torch.no_grad()
def largest_difference(
    exported: Callable[[Tensor], Tensor], pairs: list[tuple[Tensor, Tensor]], what: str
) -> float:
    """Return the largest difference of logits over the batch's largest logit.

    Raises DadFastError above `TOLERANCE`.
    """
    worst = 0.0
    for pixels, expected in pairs:
        found = exported(pixels)
        if found.shape != expected.shape:
            raise DadFastError(
                f"{what} gives logits {list(found.shape)} where the student gives "
                f"{list(expected.shape)}; nothing is kept"
            )
        difference = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-2)).item()
        if not difference <= TOLERANCE:
            raise DadFastError(
                f"{what} gives other logits than the student (by {difference:.1e} of the largest); "
                "nothing is kept"
            )
        worst = max(worst, difference)
    return worst
