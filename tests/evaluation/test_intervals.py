"""Bootstrap intervals: against plain resampling, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest

from dad_fast.evaluation.metrics.image_scores import SCORES, summarise
from dad_fast.evaluation.metrics.intervals import mean_interval
from dad_fast.evaluation.metrics.predictions import Records
from dad_fast.evaluation.metrics.result import make_result, with_intervals


def plain_bootstrap(values: np.ndarray) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.percentile(
        [random.choice(values, len(values)).mean() for _ in range(4000)], (2.5, 97.5)
    )


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


def test_interval_does_not_depend_on_order():
    values = (np.random.default_rng(0).random(100) < 0.3).astype(float)
    assert mean_interval(values) == mean_interval(values[::-1]) == mean_interval(values)


def test_coverage_is_95_percent():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = mean_interval((random.random(200) < 0.8).astype(float), resamples=400)
        covered += low <= 0.8 <= high
    assert 0.91 < covered / 400 < 0.98


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval(np.ones(50)) == (1.0, 1.0)


def records_of(count: int, parts: int) -> Records:
    random = np.random.default_rng(0)
    image, part = np.tile(np.arange(count), parts), np.repeat(np.arange(parts), count)
    confidence = np.tile(random.uniform(0.2, 1, count), parts)
    correct = np.tile((random.random(count) < 0.8 * confidence[:count]).astype(float), parts)
    values = {name: np.zeros(count * parts) for name in SCORES}
    values |= {
        "confidence": confidence,
        "correct": correct,
        "nll": -np.log(confidence),
        "brier": (1 - confidence) ** 2,
    }
    return Records("x", {"image": image, "part": part, "label": np.zeros_like(image), **values})


def test_intervals_of_calibration_equal_plain_resampling() -> None:
    records = records_of(300, 1)
    found = with_intervals(make_result("x", records, 10, 10))
    random, plain = np.random.default_rng(5), {"ece": [], "nll": [], "brier": []}
    for _ in range(1500):
        rows = random.integers(300, size=300)
        again = summarise({name: records[name][rows] for name in SCORES}, 10)
        for name, values in plain.items():
            values.append(again[name])
    for name, values in plain.items():
        expected = np.percentile(values, (2.5, 97.5))
        assert getattr(found, f"{name}_interval") == pytest.approx(
            expected, abs=0.25 * np.std(values)
        ), name


def test_parts_of_an_image_are_resampled_together() -> None:
    once, five = (
        with_intervals(make_result("x", records_of(200, parts), 10, 10)) for parts in (1, 5)
    )
    assert five.nll_interval == pytest.approx(
        once.nll_interval
    ) and five.ece_interval == pytest.approx(once.ece_interval)
    assert five.top1_interval == pytest.approx(once.top1_interval) and len(five.by_severity) == 5
