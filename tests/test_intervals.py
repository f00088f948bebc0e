"""Bootstrap intervals: against plain resampling, and against the coverage that they promise."""

from __future__ import annotations

import numpy as np
import pytest

from dad_fast.evaluate.intervals import mean_interval


def plain_bootstrap(values: np.ndarray) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.percentile([random.choice(values, len(values)).mean() for _ in range(4000)], (2.5, 97.5))


@pytest.mark.parametrize("kind", ["0 and 1", "few", "many"])
def test_equals_plain_resampling(kind):
    random = np.random.default_rng(0)
    values = {
        "0 and 1": (random.random(400) < 0.3).astype(float),
        "few": random.integers(0, 6, 400) / 5,
        "many": random.standard_normal(400),
    }[kind]
    spread = values.std() / 20
    assert mean_interval(values) == pytest.approx(plain_bootstrap(values), abs=0.15 * spread)


def test_same_data_same_interval_whatever_its_order():
    values = (np.random.default_rng(0).random(100) < 0.3).astype(float)
    assert mean_interval(values) == mean_interval(values[::-1]) == mean_interval(values)


def test_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = mean_interval((random.random(200) < 0.8).astype(float), resamples=400)
        covered += low <= 0.8 <= high
    assert 0.91 < covered / 400 < 0.98


def test_all_equal_has_no_width():
    assert mean_interval(np.ones(50)) == (1.0, 1.0)
