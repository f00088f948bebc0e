"""The four blurs of the common corruptions, and filters that other corruptions share.

A corruption takes pixels [B, C, H, W] in [0, 1], its constants for one severity, keys int64 [B] and
the stream of its random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dad_fast.methods.noise import keyed_uniform


def defocus_blur(
    x: Tensor, radius_and_alias: tuple[float, float], keys: Tensor, stream: int
) -> Tensor:
    """Convolve with a disk."""
    kernel = disk(*radius_and_alias).to(x)
    half = len(kernel) // 2
    padded = F.pad(x, (half, half, half, half), mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(x)


def disk(radius: float, alias_blur: float) -> Tensor:
    """Return a disk, anti-aliased by a small Gaussian: float64 [2r+1, 2r+1], without margin."""
    half, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    grid = torch.arange(-half, half + 1, dtype=torch.float64)
    kernel = (grid[:, None] ** 2 + grid**2 <= radius**2).double()
    offset = torch.arange(taps, dtype=torch.float64) - taps // 2
    gauss = torch.exp(-0.5 * (offset / alias_blur) ** 2)
    gauss = gauss / gauss.sum()
    padded = F.pad((kernel / kernel.sum())[None, None], (taps // 2,) * 4, mode="reflect")
    kernel = F.conv2d(padded, (gauss[:, None] * gauss)[None, None])[0, 0]
    cut = max(0, half - int(radius) - taps // 2)
    return kernel[cut : 2 * half + 1 - cut, cut : 2 * half + 1 - cut]


def glass_blur(x: Tensor, constants: tuple[float, int, int], keys: Tensor, stream: int) -> Tensor:
    """Blur, exchange pixels within `reach`, and blur again, with a Gaussian."""
    sigma, reach, passes = constants
    height, width = x.shape[-2:]
    down = gaussian_matrix(height, sigma, 4.0, "nearest").to(x.device)
    across = gaussian_matrix(width, sigma, 4.0, "nearest").to(x.device)
    # As stored in 8 bits; the margin keeps whole numbers whole despite rounding errors.
    levels = (down @ x.double() @ across.T * 255 + 1e-6).floor()
    for i in range(passes):
        draws = keyed_uniform(keys, (2, height, width), stream + i)
        levels = shuffle(levels, (draws * 2 * reach).long() - reach, reach)
    return (down @ (levels / 255) @ across.T).float()


def shuffle(x: Tensor, moves: Tensor, reach: int) -> Tensor:
    """Replace every pixel, from the last to the first, by the one at its offset at that moment.

    moves: int64 [B, 2 (x, y), H, W], the offsets, at most `reach`.

    The published loop swaps array views, `a[p], a[q] = a[q], a[p]`, which leaves a[q] unchanged. So
    a pixel takes the value that another pixel had before the pass or, if that pixel came earlier in
    the pass, the value which it took. These chains are resolved by pointer jumping.
    """
    batch, channels, height, width = x.shape
    size = height * width
    place = torch.arange(size, device=x.device)
    row, column = place // width, place % width
    moved = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)
    target = place + moves[:, 1].flatten(1) * width + moves[:, 0].flatten(1)
    source = torch.where(moved, target, place)  # [B, H * W]
    follows = (source > place) & moved[source]
    # The first `size` nodes are pixels after the pass, the others pixels before it, which end a
    # chain.
    after = torch.where(follows, source, source + size)
    before = (place + size).expand(batch, -1)
    chain = torch.cat((after, before), dim=1)
    further = chain.gather(1, chain)
    while not further.equal(chain):
        chain = further
        further = chain.gather(1, chain)
    ends = chain[:, None, :size] - size
    return x.flatten(2).gather(2, ends.expand(-1, channels, -1)).view_as(x)


def gaussian_matrix(
    side: int, sigma: float, truncate: float, edge: Literal["nearest", "reflect"]
) -> Tensor:
    """Return a Gaussian filter along one axis as a matrix, float64 [side, side].

    Weights up to `truncate` sigmas and edge modes are those of scipy.ndimage.
    """
    if sigma == 0:
        return torch.eye(side, dtype=torch.float64)
    radius = int(truncate * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    # [side, 2r+1]; may lie far outside.
    taken = torch.arange(side)[:, None] + offset
    if edge == "nearest":
        taken = taken.clamp(0, side - 1)
    else:
        taken = taken % (2 * side)
        taken = torch.minimum(taken, 2 * side - 1 - taken)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, taken, (weights / weights.sum()).expand(side, -1))


def motion_blur(
    x: Tensor, radius_and_sigma: tuple[int, float], keys: Tensor, stream: int
) -> Tensor:
    """Blur along a random direction."""
    return streak(x, random_angle(keys, -45, 45, stream), *radius_and_sigma)


def random_angle(keys: Tensor, low: float, high: float, stream: int) -> Tensor:
    """Draw angles between `low` and `high` degrees; radians, float64 [B]."""
    return torch.deg2rad(low + (high - low) * keyed_uniform(keys, (1,), stream)[:, 0].double())


def streak(x: Tensor, angles: Tensor, radius: int, sigma: float) -> Tensor:
    """Apply ImageMagick's motion blur: half a Gaussian of 2 radius + 1 taps along `angles`.

    angles: [B], in radians. Each tap is at its nearest pixel; edges repeat.
    """
    height, width = x.shape[-2:]
    step = torch.arange(2 * radius + 1, device=x.device, dtype=torch.float64)
    weights = torch.exp(-(step**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).tolist()
    down = (step * angles.sin()[:, None] - 0.5).ceil().long()  # [B, 2r+1]
    across = (step * angles.cos()[:, None] - 0.5).ceil().long()
    rows = torch.arange(height, device=x.device)[None, :, None]
    columns = torch.arange(width, device=x.device)[None, None, :]
    flat = x.flatten(2)
    total = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        row = (rows + down[:, i, None, None]).clamp(0, height - 1)
        column = (columns + across[:, i, None, None]).clamp(0, width - 1)
        flat_index = (row * width + column).flatten(1)
        index = flat_index[:, None].expand(-1, x.shape[1], -1)  # [B, C, H * W]
        total += weight * flat.gather(2, index).view_as(x)
    return total


def zoom_blur(x: Tensor, factors: Sequence[float], keys: Tensor, stream: int) -> Tensor:
    """Average the image and its enlargements about the centre."""
    total = x.clone()
    for factor in factors:
        total += enlarge(x, factor)
    return total / (len(factors) + 1)


def enlarge(x: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of `x` bilinearly to the size of `x`."""
    height, width = x.shape[-2:]
    crop_h, crop_w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    size = (round(crop_h * factor), round(crop_w * factor))
    large = F.interpolate(
        x[..., top : top + crop_h, left : left + crop_w],
        size=size,
        mode="bilinear",
        align_corners=True,
    )
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[..., top : top + height, left : left + width]
