"""Snow, frost, fog and brightness of the common corruptions."""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.evaluation.corruptions.blur import enlarge, random_angle, streak
from dad_fast.methods.noise import keyed_normal, keyed_uniform

LUMA = (0.299, 0.587, 0.114)
# Statistics of ImageNet-C's five photographs of frost: mean colour, and the standard deviation of
# the grey level within a crop of 224 px.
ICE_COLOR, ICE_CONTRAST = (0.56, 0.65, 0.69), 0.09


def snow(
    x: Tensor,
    constants: tuple[float, float, float, float, int, float, float],
    keys: Tensor,
    stream: int,
) -> Tensor:
    """Add flakes (enlarged, thresholded, streaked noise) to a whitened image, also rotated."""
    mean, spread, zoom, threshold, radius, sigma, kept = constants
    flakes = enlarge(mean + spread * keyed_normal(keys, (1, *x.shape[-2:]), stream), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = streak(flakes, random_angle(keys, -135, -45, stream + 1), radius, sigma)
    grey = (x * torch.tensor(LUMA, device=x.device).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    whitened = kept * x + (1 - kept) * torch.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + flakes.flip(2, 3)


def frost(x: Tensor, kept_and_strength: tuple[float, float], keys: Tensor, stream: int) -> Tensor:
    """Add drawn ice to the image. The published sets add photographs of frosted windows."""
    kept, strength = kept_and_strength
    return kept * x + strength * ice(keys, x.shape[2], x.shape[3], stream)


def ice(keys: Tensor, height: int, width: int, stream: int) -> Tensor:
    """Draw needles in many directions over clouds, float32 [B, 3, H, W].

    Mean colour and contrast are those of the published frost photographs.
    """
    needles = torch.full((len(keys), 1, height, width), -torch.inf, device=keys.device)
    for i in range(6):
        noise = keyed_normal(keys, (1, height, width), stream + 2 * i)
        angles = random_angle(keys, 0, 360, stream + 2 * i + 1)
        needles = torch.maximum(needles, streak(noise, angles, 6, 4.0))
    clouds = plasma(keys, _power_of_two(height, width), 2.0, stream + 16)[:, None, :height, :width]
    texture = standardized(needles) + 0.5 * standardized(clouds)
    color = torch.tensor(ICE_COLOR, device=keys.device).view(1, 3, 1, 1)
    return color + ICE_CONTRAST * standardized(texture)


def standardized(x: Tensor) -> Tensor:
    """Scale each image to mean 0 and standard deviation 1."""
    x = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return x / x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def fog(x: Tensor, strength_and_decay: tuple[float, float], keys: Tensor, stream: int) -> Tensor:
    """Blend the image with plasma clouds."""
    strength, decay = strength_and_decay
    height, width = x.shape[-2:]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    haze = plasma(keys, _power_of_two(height, width), decay, stream)[:, None, :height, :width]
    return (x + strength * haze) * brightest / (brightest + strength)


def _power_of_two(height: int, width: int) -> int:
    """Return the smallest power of two that is at least the longer side."""
    return 1 << (max(height, width) - 1).bit_length()


def plasma(keys: Tensor, side: int, decay: float, stream: int) -> Tensor:
    """Draw diamond-square clouds, float32 [B, side, side] from 0 to 1; the edges wrap.

    side: a power of two.
    """
    clouds = torch.zeros(len(keys), side, side, dtype=torch.float64, device=keys.device)
    step, wibble = side, 100.0

    def fill(rows: int, columns: int, corners: Tensor) -> None:
        nonlocal stream
        stream += 1
        noise = keyed_uniform(keys, tuple(corners.shape[1:]), stream).double() * 2 - 1
        clouds[:, rows::step, columns::step] = corners / 4 + wibble * wibble * noise

    while step >= 2:
        half = step // 2
        corner = clouds[:, ::step, ::step]
        pairs = corner + corner.roll(-1, 1)
        fill(half, half, pairs + pairs.roll(-1, 2))
        centre = clouds[:, half::step, half::step]
        fill(0, half, centre + centre.roll(1, 1) + corner + corner.roll(-1, 2))
        fill(half, 0, centre + centre.roll(1, 2) + corner + corner.roll(-1, 1))
        step, wibble = half, wibble / decay
    clouds -= clouds.amin(dim=(1, 2), keepdim=True)
    return (clouds / clouds.amax(dim=(1, 2), keepdim=True)).float()


def brightness(x: Tensor, shift: float, keys: Tensor, stream: int) -> Tensor:
    """Shift the V of HSV: all channels scale alike, and black becomes grey."""
    value = x.amax(dim=1, keepdim=True)
    shifted = (value + shift).clamp(max=1)
    return torch.where(value > 0, x * (shifted / value.clamp(min=1e-12)), shifted)
