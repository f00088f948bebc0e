"""95 % intervals of a share in percent: over the seeds of a student (Student's t), or over the images that it was judged on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Z = 1.959963985
# 97.5 % points of Student's t with 1, 2, ... degrees of freedom; beyond, the first terms of its expansion around the normal's.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
MIN_SEEDS = 3  # with two, t gives an interval nine times as wide as the values lie apart


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the mean of two or more `values`."""
    freedom = len(values) - 1
    wide = (
        T[freedom - 1]
        if freedom <= len(T)
        else Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    )
    mean, half = statistics.fmean(values), wide * statistics.stdev(values) / math.sqrt(len(values))
    return max(mean - half, 0.0), min(mean + half, 100.0)


def wilson(percent: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of `percent` of `count` images (1927)."""
    share, z2 = percent / 100, Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


def over_images(result: dict[str, Any]) -> tuple[float, float] | None:
    """The bootstrap interval of a suite's result where it is recorded, Wilson's otherwise; None where neither can be had."""
    try:
        low, high = (float(bound) for bound in result["top1_interval"])
        if low <= high and math.isfinite(low) and math.isfinite(high):
            return low, high
    except (KeyError, TypeError, ValueError):
        pass
    count, top1 = result.get("num_images"), float(result["top1"])
    return (
        wilson(top1, count) if isinstance(count, int) and count > 0 and 0 <= top1 <= 100 else None
    )


def interval(results: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Of one suite: over seeds where there are enough of them, else over images (of several seeds: the mean of their bounds)."""
    values = [float(result["top1"]) for result in results]
    if len(values) >= MIN_SEEDS:
        return over_seeds(values) if all(map(math.isfinite, values)) else None
    bounds = [found for result in results if (found := over_images(result))]
    if not bounds:
        return None
    return statistics.fmean(low for low, _ in bounds), statistics.fmean(high for _, high in bounds)
