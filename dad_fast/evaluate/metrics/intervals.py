"""95 % intervals by the percentile bootstrap over images (Efron 1979); the same data always gives the same interval."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

RESAMPLES = 2000
LEVEL = (2.5, 97.5)  # percentiles
_SEED = 20231101
_FEW = 64  # distinct values up to which a resample is drawn by their numbers


def mean_interval(values: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Interval of the mean of `values`, float [N], one per image.

    With few distinct values, such as 0 and 1, a resample is drawn as how often each comes up: the same distribution, at a cost that
    does not grow with N. A statistic that is a weighted sum of means over the same images is the mean of the images' weighted sums.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW:
        draws = np.random.default_rng(_SEED).multinomial(
            len(values), counts / len(values), size=resamples
        )  # [R, distinct]
        means = draws @ distinct / len(values)
    else:
        means = np.array([values[rows].mean() for rows in resampled(len(values), resamples)])
    return interval(means)


def resampled(count: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """For each resample the images that are in it, int64 [count], with repetition."""
    random = np.random.default_rng(_SEED)
    for _ in range(resamples):
        yield random.integers(count, size=count)


def interval(statistics: np.ndarray) -> tuple[float, float]:
    """The interval of a statistic's values over the resamples."""
    low, high = np.percentile(statistics, LEVEL)
    return float(low), float(high)
