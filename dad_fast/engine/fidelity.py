"""Fit of a discretizer to the data, measured on a few images of the first batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.discretizers.base import Discretizer

# Images that are measured; a VQGAN pass on a CPU is expensive.
NUM_MEASURED = 8
# Share of the variance of the pixels
MUCH_LOST = 0.3
# Mean difference between the channels of colour images, and the share of it that is worth a warning
COLOURED, GREY = 0.03, 0.25
# Distinct codes, as a share of those that the images could have
FEW_CODES = 0.05
# Flat images have no variance to lose, and a handful of codes has no statistics.
FLAT, FEWEST = 1e-4, 64


class Fidelity(NamedTuple):
    """A few images before and after a discretizer."""

    side: int  # pixels
    rms: float  # error of pixels in [0, 1]
    lost: float  # mean square error over the variance of the images; 0 for flat ones
    colour: float  # mean difference of the channels before
    colour_after: float
    codes: int  # distinct ones; 0 without codes
    possible: int  # codes that could be distinct: those of the images, or the codebook's


@torch.no_grad()
def measure_fidelity(discretizer: Discretizer, pixels: Tensor) -> Fidelity:
    """Discretize the first few of `pixels` [B, 3, H, W] in [0, 1] and compare. Reads the results."""
    pixels = pixels[:NUM_MEASURED].float()
    images, codes = discretizer(pixels)
    error = (images - pixels).square().mean().item()
    variance = pixels.var(dim=(0, 2, 3), correction=0).mean().item()
    distinct = possible = 0
    if codes is not None:
        distinct, possible = len(codes.unique()), codes.numel()
        if discretizer.codebook is not None:
            possible = min(possible, len(discretizer.codebook))
    return Fidelity(
        side=pixels.shape[-1],
        rms=error**0.5,
        lost=error / variance if variance > FLAT else 0.0,
        colour=_colour(pixels),
        colour_after=_colour(images),
        codes=distinct,
        possible=possible,
    )


def warning_of_misfit(found: Fidelity, discretizer: Discretizer) -> str | None:
    """Return a warning, with what was measured, if the discretizer does not fit the images."""
    name, problems = discretizer.name, []
    trained = discretizer.image_size
    if trained and not trained / 2 < found.side < trained * 2:
        problems.append(f"it was trained on images of {trained} px, and these have {found.side}")
    if found.lost > MUCH_LOST:
        lost = "all" if found.lost > 1 else f"{found.lost:.0%}"
        problems.append(f"it loses {lost} of the images' variance (rms error {found.rms:.3f})")
    if found.colour > COLOURED and found.colour_after < GREY * found.colour:
        problems.append(
            "it turns colour into grey (mean difference of the channels "
            f"{found.colour:.3f} before, {found.colour_after:.3f} after)"
        )
    if found.possible >= FEWEST and found.codes < FEW_CODES * found.possible:
        problems.append(f"the first images use {found.codes} of {found.possible:,} possible codes")
    if not problems:
        return None
    fix = "use another, or train one on these images: dad-fast fit-discretizer"
    return f"{name} may not fit the data: {'; '.join(problems)}; {fix}"


def _colour(pixels: Tensor) -> float:
    """Return the mean difference between the largest and the smallest channel of a pixel."""
    return (pixels.amax(1) - pixels.amin(1)).mean().item()
