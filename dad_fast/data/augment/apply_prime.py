"""Execution of PRIME's records, in float32 and [0, 1] from the first operation to the last."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft
from PIL import Image

from dad_fast.data.augment.prime import DEFORM_CUTS, Curve, Deform, Filter, PrimeChains

# Points of a colour curve's table between two levels of 8 bits. Linear interpolation errs by less
# than a level at the highest frequency.
_BETWEEN = 32
_STEPS = 255 * _BETWEEN


def average_prime(image: Image.Image, blend: PrimeChains) -> Image.Image:
    """Blend a square RGB image with the average of its chains."""
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255.0)
    mixed = pixels * np.float32(1.0 - blend.share)
    for weight, chain in zip(blend.weights, blend.chains, strict=True):
        branch = pixels
        for op in chain:
            branch = _APPLY[type(op)](branch, op)
        mixed += branch * np.float32(blend.share * weight)
    levels = np.rint(mixed.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


def _filter(pixels: np.ndarray, op: Filter) -> np.ndarray:
    """Correlate float32 [3, S, S] with 3x3 weights; black beyond the edges."""
    side = pixels.shape[-1]
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    found, scaled = np.zeros_like(pixels), np.empty_like(pixels)
    for place, weight in enumerate(op.weights):
        row, column = divmod(place, 3)
        shifted = padded[:, row : row + side, column : column + side]
        found += np.multiply(shifted, np.float32(weight), out=scaled)
    return found.clip(0.0, 1.0, out=found)


def _curve(pixels: np.ndarray, op: Curve) -> np.ndarray:
    """Look up float32 [3, S, S] in a fine table of the curve, by linear interpolation."""
    count = len(op.weights[0])
    coefficients = np.zeros((3, _STEPS - 1), np.float32)
    coefficients[:, op.first - 1 : op.first - 1 + count] = op.weights
    # The sum of the sines at v = j / _STEPS is half a DST-I; it is 0 at both ends.
    table = np.zeros((3, _STEPS + 2), np.float32)
    table[:, 1:_STEPS] = scipy.fft.dst(coefficients, type=1, axis=1) / 2
    place = pixels * np.float32(_STEPS)
    index = place.astype(np.int32)
    place -= index
    found = np.empty_like(pixels)
    for channel in range(3):
        below = table[channel].take(index[channel])
        above = table[channel].take(index[channel] + 1)
        above -= below
        above *= place[channel]
        found[channel] = below + above
    found += pixels
    return found.clip(0.0, 1.0, out=found)


def _deform(pixels: np.ndarray, op: Deform) -> np.ndarray:
    """Displace float32 [3, S, S], bilinear; the edge continues beyond the image."""
    # Half a second and a gigabyte of address space: for this operation alone.
    import torch

    side = pixels.shape[-1]
    if side < 3:
        return pixels
    moved = math.sqrt(op.temperature) * side * displacement(op.cut, op.seed, side)
    # grid_sample's coordinates: -1 and 1 are the centres of the first and the last pixel.
    steps = np.linspace(-1.0, 1.0, side, dtype=np.float32)
    scale = np.float32(2.0 / (side - 1))
    x, y = steps - moved[0] * scale, steps[:, None] - moved[1] * scale
    grid = torch.from_numpy(np.stack([x, y], axis=-1).astype(np.float32))
    found = torch.nn.functional.grid_sample(
        torch.from_numpy(pixels)[None],
        grid[None],
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    return found[0].numpy()


def displacement(cut: int, seed: int, side: int) -> np.ndarray:
    """Return two sums of random sine modes on [0, 1]², float32 [2, side, side].

    The mode (i, j) is sin(π i x) sin(π j y) with a normal coefficient of standard deviation
    1 / sqrt(i² + j²), for i² + j² < (cut + 1/2)².
    """
    stds = mode_stds(cut, side)
    bits = np.random.Philox(key=np.array([seed, 3], np.uint64))
    normals = np.random.Generator(bits).standard_normal((2, *stds.shape), dtype=np.float32)
    sines = _sines(side)[:, : len(stds)]
    return sines @ (normals * stds) @ sines.T


@lru_cache(maxsize=64)
def mode_stds(cut: int, side: int) -> np.ndarray:
    """Return the standard deviations of the modes that differ on a grid of `side` points.

    There sin(π k x) at k and at 2 (side - 1) ± k are equal but for the sign. Modes above side - 2
    are folded onto lower ones: the same distribution, with fewer numbers.
    """
    squared, variances = _modes(cut)
    variances = np.where(squared < np.float32((cut + 0.5) ** 2), variances, np.float32(0.0))
    for _ in range(2):
        variances = _fold(variances, side).T
    return np.sqrt(variances)


def _modes(cut: int) -> tuple[np.ndarray, np.ndarray]:
    """Return i² + j² and its inverse for i, j = 1 … cut: float32 [cut, cut]."""
    squared, inverse = _all_modes(max(cut, DEFORM_CUTS[1]))
    return squared[:cut, :cut], inverse[:cut, :cut]


@lru_cache(maxsize=1)
def _all_modes(highest: int) -> tuple[np.ndarray, np.ndarray]:
    squares = np.arange(1, highest + 1, dtype=np.float32) ** 2
    squared = squares[:, None] + squares
    return squared, 1.0 / squared


def _fold(values: np.ndarray, side: int) -> np.ndarray:
    """Fold the rows of modes 1, 2, ... onto the modes 1 … side - 2."""
    distinct, period = side - 2, 2 * (side - 1)
    if len(values) <= distinct:
        return values
    found = values[:distinct].copy()
    for start in range(period, len(values) + side, period):
        # Modes start - 1, start - 2, ... and start + 1, start + 2, ...
        below = values[start - 1 - distinct : start - 1][::-1]
        missing = max(0, start - 1 - len(values))
        found[missing : missing + len(below)] += below
        above = values[start : start + distinct]
        found[: len(above)] += above
    return found


@lru_cache(maxsize=4)
def _sines(side: int) -> np.ndarray:
    """Return sin(π k x) at `side` points of [0, 1], for k = 1 … side - 2: float32 [side, side - 2]."""
    points = np.linspace(0.0, 1.0, side)
    return np.sin(math.pi * points[:, None] * np.arange(1, side - 1)).astype(np.float32)


_APPLY: dict[type, Callable[[np.ndarray, Any], np.ndarray]] = {
    Filter: _filter,
    Curve: _curve,
    Deform: _deform,
}
