"""Fractals to mix in: attractors of random iterated function systems, grey, a fixed numbered set.

The systems are drawn as in arXiv 2110.03091: 2 to 8 contractions whose singular values have a
weighted sum in a range of rich shapes. Own code: no kept package draws them.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from dad_fast.keyed_random import PICTURE, Draws

SIDE = 128
_POINTS = 2048
_SETTLE = 12
_DRAWN = 32


@cache
def fractal(number: int) -> np.ndarray:
    """Return the density of a fractal, uint8 [SIDE, SIDE]; 0 is empty. Read-only.

    Kept: the whole set is 16 MiB in each process, and drawing one takes some milliseconds.
    """
    draws = Draws(0, PICTURE, 0, number)
    while True:
        density = _density(*_system(draws), seed=draws.below(1 << 53))
        # A tenth of the area at least: thin curves would hardly be seen.
        if np.count_nonzero(density) > density.size // 10:
            density.setflags(write=False)
            return density


def _system(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Draw matrices float32 [maps, 2, 2] and offsets float32 [maps, 2]."""
    maps = 2 + draws.below(7)
    target = draws.between((5 + maps) / 2, (6 + maps) / 2)
    while True:
        pairs = [sorted((draws.uniform(), draws.uniform()), reverse=True) for _ in range(maps)]
        scale = target / sum(large + 2 * small for large, small in pairs)
        if all(large * scale < 1 for large, _ in pairs):
            break
    matrices = [
        _rotation(draws)
        @ np.diag([large * scale, small * scale * draws.signed(1)])
        @ _rotation(draws)
        for large, small in pairs
    ]
    offsets = [(draws.between(-1, 1), draws.between(-1, 1)) for _ in range(maps)]
    return np.array(matrices, np.float32), np.array(offsets, np.float32)


def _rotation(draws: Draws) -> np.ndarray:
    angle = draws.between(0, 2 * math.pi)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _density(matrices: np.ndarray, offsets: np.ndarray, seed: int) -> np.ndarray:
    """Play the chaos game with many points at once and count where they come: uint8 [SIDE, SIDE]."""
    areas = np.abs(np.linalg.det(matrices)) + 1e-3
    bounds = np.cumsum(areas / areas.sum())
    bits = np.random.Philox(key=np.array([seed, 2], np.uint64)).random_raw(
        (_SETTLE + _DRAWN) * _POINTS
    )
    chosen = np.searchsorted(bounds[:-1], (bits >> np.uint64(11)) * 2.0**-53, side="right")
    points = np.zeros((_POINTS, 2), np.float32)
    kept = []
    for step, maps in enumerate(chosen.reshape(-1, _POINTS)):
        points = np.einsum("nij,nj->ni", matrices[maps], points) + offsets[maps]
        if step >= _SETTLE:
            kept.append(points)
    places = np.concatenate(kept)
    # Percentiles, so that a few far points do not make the rest small.
    low, high = np.percentile(places, (1, 99), axis=0)
    cells = ((places - low) / np.maximum(high - low, 1e-6) * SIDE).astype(np.int64)
    cells = cells[((cells >= 0) & (cells < SIDE)).all(axis=1)]
    counts = np.bincount(cells[:, 1] * SIDE + cells[:, 0], minlength=SIDE * SIDE)
    logs = np.log1p(counts.reshape(SIDE, SIDE))
    return np.rint(logs * (255.0 / logs.max())).astype(np.uint8)
