"""The 15 common corruptions on the fly, batched, on the device of the images; and `invert`.

Definitions and constants: Hendrycks & Dietterich 2019 (arXiv 1903.12261). Images of up to 64 pixels
a side take the constants published for CIFAR-10-C (32 px), larger ones those for ImageNet-C (224
px). `invert` (1 - x) is our own. Differences from the published sets: random numbers are keyed by
image, results stay float instead of uint8 (CIFAR-10-C) or JPEG of quality 85 (ImageNet-C), and
frost is drawn, since its photographs may not be redistributed. For comparable ImageNet-C numbers
use the published folders (`imagenet-c=DIR`).

Own code rather than the package imagecorruptions, which has only the 224-px constants, uses numpy's
global random state, works on one image at a time, and fails with NumPy 2 and scikit-image 0.19.

Each corruption takes pixels [B, 3, H, W] in [0, 1]; `corrupt` clamps the result. `stream` selects
the random numbers of one corruption and severity.
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

from dad_fast.evaluation.corruptions.blur import (
    defocus_blur,
    gaussian_matrix,
    glass_blur,
    motion_blur,
    zoom_blur,
)
from dad_fast.evaluation.corruptions.weather import brightness, fog, frost, snow
from dad_fast.methods.noise import keyed_normal, keyed_uniform

SMALL_SIDE = 64
# Notes below tables for corruptions that differ from the published ones.
REMARKS = {
    "frost": "the ice is drawn by a program; the published sets add photographs of it, "
    "so their numbers differ"
}


def _gaussian_noise(x: Tensor, sigma: float, keys: Tensor, stream: int) -> Tensor:
    return x + sigma * keyed_normal(keys, tuple(x.shape[1:]), stream)


def _shot_noise(x: Tensor, photons: float, keys: Tensor, stream: int) -> Tensor:
    """Draw Poisson(x * photons) / photons by inversion.

    The distribution functions of the 256 pixel values lie end to end in one sorted table (row v
    holds v + CDF), so that one search finds every count.
    """
    levels = torch.arange(256, device=x.device, dtype=torch.float64)
    most = int(photons + 8 * math.sqrt(photons) + 20)
    counts = torch.arange(most, device=x.device, dtype=torch.float64)
    rate = levels[:, None] / 255 * photons  # [256, 1]
    log_pmf = torch.special.xlogy(counts, rate) - rate - torch.lgamma(counts + 1)  # [256, K]
    table = levels[:, None] + log_pmf.exp().cumsum(dim=1).clamp(max=1)
    level = (x * 255).round().double().contiguous()
    draw = level + keyed_uniform(keys, tuple(x.shape[1:]), stream).double()
    found = torch.searchsorted(table.flatten(), draw, right=True) - level.long() * len(counts)
    return found.float() / photons


def _impulse_noise(x: Tensor, amount: float, keys: Tensor, stream: int) -> Tensor:
    draw = keyed_uniform(keys, tuple(x.shape[1:]), stream)
    return torch.where(draw < amount / 2, 0.0, torch.where(draw < amount, 1.0, x))


def _contrast(x: Tensor, factor: float, keys: Tensor, stream: int) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _elastic_transform(
    x: Tensor, constants: tuple[float, float, float], keys: Tensor, stream: int
) -> Tensor:
    """Apply a random affine map of the middle, then a random smooth displacement.

    constants: alpha, sigma and reach in pixels. Both steps sample bilinearly.
    """
    alpha, sigma, reach = constants
    height, width = x.shape[-2:]
    middle_x, middle_y, third = width // 2, height // 2, min(height, width) // 3
    corners = ((third, third), (third, -third), (-third, -third))
    before = torch.tensor(corners, device=x.device, dtype=torch.float64)
    before += torch.tensor((middle_x, middle_y), device=x.device)
    offset = 2 * keyed_uniform(keys, (3, 2), stream).double() - 1
    after = before + reach * offset  # [B, 3, 2 (x, y)]
    ones = torch.ones_like(after[..., :1])
    # [B, 3, 2]: maps (x, y, 1) of the result to (x, y) of the image.
    back = torch.linalg.solve(torch.cat((after, ones), dim=-1), before.expand_as(after))
    rows = torch.arange(height, device=x.device, dtype=torch.float64)
    columns = torch.arange(width, device=x.device, dtype=torch.float64)
    xy = (columns.expand(height, -1), rows[:, None].expand(-1, width))
    grid = torch.stack(xy, dim=-1)  # [H, W, 2 (x, y)]
    where = grid @ back[:, None, :2] + back[:, None, 2:]
    warped = _sample(x.double(), where, around_centres=True)

    down = gaussian_matrix(height, sigma, 3.0, "reflect").to(x.device)
    across = gaussian_matrix(width, sigma, 3.0, "reflect").to(x.device)
    noise = 2 * keyed_uniform(keys, (2, height, width), stream + 1).double() - 1
    shift = (alpha * (down @ noise @ across.T)).permute(0, 2, 3, 1)  # [B, H, W, 2 (x, y)]
    return _sample(warped, grid + shift, around_centres=False).float()


def _sample(x: Tensor, where: Tensor, around_centres: bool) -> Tensor:
    """Sample `x` [B, C, H, W] at `where` [B, H, W, 2 (x, y)] in pixels.

    Mirrored around the centres of the outermost pixels, or around their edges.
    """
    size = torch.tensor((x.shape[3], x.shape[2]), device=x.device, dtype=x.dtype)
    unit = 2 * where / (size - 1) - 1 if around_centres else (2 * where + 1) / size - 1
    return F.grid_sample(
        x, unit, mode="bilinear", padding_mode="reflection", align_corners=around_centres
    )


def _pixelate(x: Tensor, share: float, keys: Tensor, stream: int) -> Tensor:
    def down_and_up(side: int) -> Tensor:
        small = int(side * share)
        return (box_resize(small, side) @ box_resize(side, small)).to(x)  # [side, side]

    return down_and_up(x.shape[2]) @ x @ down_and_up(x.shape[3]).T


def box_resize(side: int, new_side: int) -> Tensor:
    """Return PIL's box filter along one axis as a matrix, float64 [new_side, side].

    A new pixel is the mean of the pixels whose centres lie in its box.
    """
    scale = side / new_side
    centre = (torch.arange(new_side, dtype=torch.float64) + 0.5) * scale  # [new_side]
    offset = (torch.arange(side, dtype=torch.float64) + 0.5 - centre[:, None]) / max(scale, 1.0)
    member = ((offset > -0.5) & (offset <= 0.5)).double()
    return member / member.sum(dim=1, keepdim=True)


def _jpeg_compression(x: Tensor, quality: int, keys: Tensor, stream: int) -> Tensor:
    """Encode and decode with PIL on the host; 4:2:0 chroma as published."""
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
    # As published, with the rounding of `arange`.
    return tuple(np.arange(1, end, step).tolist() for end, step in ends_and_steps)


def _in_pixels(side: int, *shares: tuple[float, float, float]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(side * share for share in one) for one in shares)


# In the order of ImageNet-C's folders. Name: function, CIFAR-10-C's constants for severities 1 to
# 5, ImageNet-C's constants.
_TABLE: dict[str, tuple[Callable[..., Tensor], Sequence[Any], Sequence[Any]]] = {
    "gaussian_noise": (
        _gaussian_noise,
        (0.04, 0.06, 0.08, 0.09, 0.10),
        (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": (
        _impulse_noise,
        (0.01, 0.02, 0.03, 0.05, 0.07),
        (0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": (
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (
        motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (
        zoom_blur,
        _factors((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        _factors((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (
        frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (
        fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        _elastic_transform,
        _in_pixels(
            32,
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        # 244, as published.
        _in_pixels(
            244,
            (2, 0.7, 0.1),
            (2, 0.08, 0.2),
            (0.05, 0.01, 0.02),
            (0.07, 0.01, 0.02),
            (0.12, 0.01, 0.02),
        ),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "invert": (_invert, (None,), (None,)),
}


def corrupt(name: str, pixels: Tensor, severity: int, keys: Tensor) -> Tensor:
    """Apply corruption `name` at `severity`, 1 … 5 (`invert` has only 1); float32 [B, 3, H, W].

    pixels: float [B, 3, H, W] in [0, 1]. keys: int64 [B], one per image. Up to rounding the result
    depends on image, key, name and severity alone, not on the rest of the batch.
    """
    function, small, large = _TABLE[name]
    constants = small if min(pixels.shape[-2:]) <= SMALL_SIDE else large
    stream = zlib.crc32(name.encode()) << 16 | severity << 8
    return function(pixels.float(), constants[severity - 1], keys, stream).clamp(0, 1)


CORRUPTIONS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    name: partial(corrupt, name) for name in _TABLE
}
