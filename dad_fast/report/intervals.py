"""95 % intervals of a percentage and of a difference: over a student's seeds (Student's t), or over
test images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from dad_fast.evaluation.tables import spread, value_of

Z = 1.959963985
# 97.5 % points of Student's t with 1, 2, ... degrees of freedom.
T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
# With two seeds, Student's t gives an interval nine times as wide as their distance.
MIN_SEEDS = 3


class Difference(NamedTuple):
    mean: float
    interval: tuple[float, float] | None  # 95 %; None for a single pair
    pairs: list[float]  # one per seed that both have


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of the mean of two or more `values`, by Student's t."""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values)
    half = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return max(mean - half, 0.0), min(mean + half, 100.0)


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % point of Student's t: a table, then its expansion around the normal's."""
    if degrees <= len(T):
        return T[degrees - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    return Z + first / degrees + second / degrees**2


def wilson(percent: float, count: int) -> tuple[float, float]:
    """Return the score interval (Wilson, 1927) of `percent` of `count` images."""
    share, z2 = percent / 100, Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


def over_images(result: dict[str, Any]) -> tuple[float, float] | None:
    """Return a result's recorded bootstrap interval, else Wilson's; None if neither is possible."""
    try:
        low, high = (float(bound) for bound in result["top1_interval"])
        if low <= high and math.isfinite(low) and math.isfinite(high):
            return low, high
    except (KeyError, TypeError, ValueError):
        pass
    count, top1 = result.get("num_images"), float(result["top1"])
    if isinstance(count, int) and count > 0 and 0 <= top1 <= 100:
        return wilson(top1, count)
    return None


def interval(results: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Return the interval of one suite's results, one per seed.

    Over seeds if there are at least MIN_SEEDS, else over images: the mean of the seeds' bounds.
    """
    values = [float(result["top1"]) for result in results]
    if len(values) >= MIN_SEEDS:
        return over_seeds(values) if all(map(math.isfinite, values)) else None
    bounds = [found for found in map(over_images, results) if found]
    if not bounds:
        return None
    return statistics.fmean(low for low, _ in bounds), statistics.fmean(high for _, high in bounds)


def difference(
    base: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], suite: str, metric: str = "top1"
) -> Difference | None:
    """Return `runs` minus `base`, paired by seed; None without a common seed.

    Runs of one seed share their initial weights, image order and augmentation. The interval is
    Student's t over the differences of each seed.
    """
    by_seed = {run["seed"]: value_of(run, suite, metric) for run in base}
    both = ((value_of(run, suite, metric), by_seed.get(run["seed"])) for run in runs)
    pairs = [here - there for here, there in both if here is not None and there is not None]
    if not pairs:
        return None
    mean, deviation = spread(pairs)
    if deviation is None:
        return Difference(mean, None, pairs)
    half = t_quantile(len(pairs) - 1) * deviation / math.sqrt(len(pairs))
    return Difference(mean, (mean - half, mean + half), pairs)


def unpaired(
    base: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]
) -> Difference | None:
    """Return the mean top-1 of `results` minus that of `base`, from the `interval` of each.

    The bounds are those of Newcombe (1998, method 10), for independent estimates: on the same test
    images the interval is wider than a paired one. None where an interval is missing.
    """
    first, second = interval(results), interval(base)
    if first is None or second is None:
        return None
    here = statistics.fmean(float(result["top1"]) for result in results)
    there = statistics.fmean(float(result["top1"]) for result in base)
    mean = here - there
    low = mean - math.hypot(here - first[0], second[1] - there)
    high = mean + math.hypot(first[1] - here, there - second[0])
    return Difference(mean, (low, high), [])
