"""95 % intervals by the percentile bootstrap over images (Efron 1979).

The same data always gives the same interval. Own code rather than scipy.stats.bootstrap: with few
distinct values the cost does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

RESAMPLES = 2000
# In percentiles.
LEVEL = (2.5, 97.5)
_SEED = 20231101
# Number of distinct values up to which resamples are drawn as counts of the values.
_FEW = 64


def mean_interval(values: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the interval of the mean of `values`, float [N], one per image.

    With few distinct values, such as 0 and 1, a resample is drawn as the count of each value: the
    same distribution, at a cost that does not grow with N. For a weighted sum of means over the
    same images, pass the weighted sum of each image.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW:
        random = np.random.default_rng(_SEED)
        shares = counts / len(values)
        draws = random.multinomial(len(values), shares, size=resamples)  # [R, distinct]
        means = draws @ distinct / len(values)
    else:
        means = np.array([values[rows].mean() for rows in resampled(len(values), resamples)])
    return interval(means)


def resampled(count: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Yield the images of each resample, int64 [count], drawn with replacement."""
    random = np.random.default_rng(_SEED)
    for _ in range(resamples):
        yield random.integers(count, size=count)


def interval(statistics: np.ndarray) -> tuple[float, float]:
    """Return the interval of a statistic from its values over the resamples."""
    low, high = np.percentile(statistics, LEVEL)
    return float(low), float(high)
