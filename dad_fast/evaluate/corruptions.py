"""Common corruptions on the fly, batched, on the device of the images.

Definitions and constants: Hendrycks & Dietterich 2019 (arXiv 1903.12261). Images of up to 64 pixels a side take the constants
published for CIFAR-10-C (32 px), larger ones those for ImageNet-C (224 px); neither is scaled further. `invert` (1 - x) is ours.
Differences from the published sets: random numbers are keyed by image, and results stay float instead of being stored as uint8
(CIFAR-10-C) or as JPEG of quality 85 (ImageNet-C). For reported ImageNet-C numbers read the published folders.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dad_fast.methods.noise import keyed_normal, keyed_uniform

SMALL_SIDE = 64

# Each works on pixels [B, 3, H, W] in [0, 1]; the caller clamps. `stream` makes the draws belong to one corruption and severity.


def _gaussian_noise(x: Tensor, sigma: float, keys: Tensor, stream: int) -> Tensor:
    return x + sigma * keyed_normal(keys, tuple(x.shape[1:]), stream)


def _shot_noise(x: Tensor, photons: float, keys: Tensor, stream: int) -> Tensor:
    """Poisson(x * photons) / photons, by inversion: the 256 pixel values have 256 distribution functions, laid end to end in one
    sorted table (row v holds v + CDF), so that one search finds every count."""
    levels = torch.arange(256, device=x.device, dtype=torch.float64)
    counts = torch.arange(int(photons + 8 * math.sqrt(photons) + 20), device=x.device, dtype=torch.float64)
    rate = levels[:, None] / 255 * photons  # [256, 1]
    log_pmf = torch.special.xlogy(counts, rate) - rate - torch.lgamma(counts + 1)  # [256, K]
    table = levels[:, None] + log_pmf.exp().cumsum(dim=1).clamp(max=1)
    level = (x * 255).round().double()
    draw = level + keyed_uniform(keys, tuple(x.shape[1:]), stream).double()
    found = torch.searchsorted(table.flatten(), draw, right=True) - level.long() * len(counts)
    return found.float() / photons


def _impulse_noise(x: Tensor, amount: float, keys: Tensor, stream: int) -> Tensor:
    draw = keyed_uniform(keys, tuple(x.shape[1:]), stream)
    return torch.where(draw < amount / 2, 0.0, torch.where(draw < amount, 1.0, x))


def _defocus_blur(x: Tensor, radius_and_alias: tuple[float, float], keys: Tensor, stream: int) -> Tensor:
    kernel = disk(*radius_and_alias).to(x)
    half = len(kernel) // 2
    padded = F.pad(x, (half, half, half, half), mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(x)


def disk(radius: float, alias_blur: float) -> Tensor:
    """The lens: a disk, anti-aliased by a small Gaussian; float64 [2r+1, 2r+1], cut to where it is not zero."""
    half, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    grid = torch.arange(-half, half + 1, dtype=torch.float64)
    kernel = (grid[:, None] ** 2 + grid**2 <= radius**2).double()
    gauss = torch.exp(-0.5 * ((torch.arange(taps, dtype=torch.float64) - taps // 2) / alias_blur) ** 2)
    gauss = gauss / gauss.sum()
    padded = F.pad((kernel / kernel.sum())[None, None], (taps // 2,) * 4, mode="reflect")
    kernel = F.conv2d(padded, (gauss[:, None] * gauss)[None, None])[0, 0]
    cut = max(0, half - int(radius) - taps // 2)
    return kernel[cut : 2 * half + 1 - cut, cut : 2 * half + 1 - cut]


def _zoom_blur(x: Tensor, factors: Sequence[float], keys: Tensor, stream: int) -> Tensor:
    """Mean of the image and of its enlargements about the centre."""
    height, width = x.shape[-2:]
    total = x.clone()
    for factor in factors:
        crop_h, crop_w = math.ceil(height / factor), math.ceil(width / factor)
        top, left = (height - crop_h) // 2, (width - crop_w) // 2
        size = (round(crop_h * factor), round(crop_w * factor))
        large = F.interpolate(x[..., top : top + crop_h, left : left + crop_w], size=size, mode="bilinear", align_corners=True)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        total += large[..., top : top + height, left : left + width]
    return total / (len(factors) + 1)


def _fog(x: Tensor, strength_and_decay: tuple[float, float], keys: Tensor, stream: int) -> Tensor:
    strength, decay = strength_and_decay
    height, width = x.shape[-2:]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    haze = plasma(keys, 1 << (max(height, width) - 1).bit_length(), decay, stream)[:, None, :height, :width]
    return (x + strength * haze) * brightest / (brightest + strength)


def plasma(keys: Tensor, side: int, decay: float, stream: int) -> Tensor:
    """Diamond-square clouds, float32 [B, side, side] from 0 to 1; `side` is a power of two and the edges wrap."""
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


def _brightness(x: Tensor, shift: float, keys: Tensor, stream: int) -> Tensor:
    """The V of HSV is shifted: all channels scale alike, and black becomes grey."""
    value = x.amax(dim=1, keepdim=True)
    shifted = (value + shift).clamp(max=1)
    return torch.where(value > 0, x * (shifted / value.clamp(min=1e-12)), shifted)


def _contrast(x: Tensor, factor: float, keys: Tensor, stream: int) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _pixelate(x: Tensor, share: float, keys: Tensor, stream: int) -> Tensor:
    def down_and_up(side: int) -> Tensor:
        small = int(side * share)
        return (box_resize(small, side) @ box_resize(side, small)).to(x)  # [side, side]

    return down_and_up(x.shape[2]) @ x @ down_and_up(x.shape[3]).T


def box_resize(side: int, new_side: int) -> Tensor:
    """PIL's box filter along one axis as a matrix, float64 [new_side, side]: pixels whose centres lie in a new pixel's box, averaged."""
    scale = side / new_side
    centre = (torch.arange(new_side, dtype=torch.float64) + 0.5) * scale  # [new_side]
    offset = (torch.arange(side, dtype=torch.float64) + 0.5 - centre[:, None]) / max(scale, 1.0)
    member = ((offset > -0.5) & (offset <= 0.5)).double()
    return member / member.sum(dim=1, keepdim=True)


def _jpeg_compression(x: Tensor, quality: int, keys: Tensor, stream: int) -> Tensor:
    """PIL's encoder on the host; 4:2:0 chroma as published."""
    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = np.empty_like(images)
    for i, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded[i] = np.asarray(Image.open(file))
    return torch.from_numpy(decoded).to(x.device).permute(0, 3, 1, 2).float() / 255


def _invert(x: Tensor, nothing: None, keys: Tensor, stream: int) -> Tensor:
    return 1 - x


def _factors(*ends_and_steps: tuple[float, float]) -> tuple[list[float], ...]:
    return tuple(np.arange(1, end, step).tolist() for end, step in ends_and_steps)  # as published, with its rounding


# name: (function, CIFAR-10-C's constants for severities 1 to 5, ImageNet-C's)
_TABLE: dict[str, tuple[Callable[..., Tensor], Sequence[Any], Sequence[Any]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "zoom_blur": (
        _zoom_blur,
        _factors((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        _factors((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "invert": (_invert, (None,), (None,)),
}


def corrupt(name: str, pixels: Tensor, severity: int, keys: Tensor) -> Tensor:
    """Apply corruption `name` at `severity` (1 … 5; `invert` has only 1) to pixels, float [B, 3, H, W] in [0, 1]; float32 of that shape.

    keys: int64 [B], one per image. The result is a function of (image, key, name, severity) alone, whatever else is in the batch.
    """
    function, small, large = _TABLE[name]
    constants = small if min(pixels.shape[-2:]) <= SMALL_SIDE else large
    stream = zlib.crc32(name.encode()) << 16 | severity << 8
    return function(pixels.float(), constants[severity - 1], keys, stream).clamp(0, 1)


def num_severities(name: str) -> int:
    return len(_TABLE[name][1])


CORRUPTIONS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {name: partial(corrupt, name) for name in _TABLE}
