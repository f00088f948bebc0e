"""Detection of unknown classes: against the definitions, computed by loops, and known values."""

from __future__ import annotations

import numpy as np
import pytest

from dad_fast.evaluation.metrics.image_scores import SCORES
from dad_fast.evaluation.metrics.ood_detection import detect, metrics
from dad_fast.evaluation.metrics.predictions import Records


def cases() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    smooth = random.normal(1, 1, 300), random.normal(0, 1, 170)
    tied = random.integers(0, 5, 300).astype(float) + 1, random.integers(0, 5, 170).astype(float)
    return [smooth, tied, (smooth[0], smooth[0][:100]), (np.ones(5), np.ones(3))]


@pytest.mark.parametrize("case", range(4))
def test_equals_the_definitions(case: int) -> None:
    known, unknown = cases()[case]
    found = metrics(known, unknown)
    pairs = (known[:, None] > unknown).mean() + (known[:, None] == unknown).mean() / 2
    assert found["auroc"] == pytest.approx(100 * pairs)
    assert found["aupr"] == pytest.approx(100 * average_precision(known, unknown))
    assert found["aupr_out"] == pytest.approx(100 * average_precision(-unknown, -known))
    passing = [t for t in known if (known >= t).mean() >= 0.95]
    assert found["fpr95"] == pytest.approx(100 * (unknown >= max(passing)).mean())


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Sum over thresholds, from the highest, of precision times the recall gained there."""
    total = before = 0.0
    for threshold in sorted(set(positives), reverse=True):
        hits = (positives >= threshold).sum()
        recall = hits / len(positives)
        total += (recall - before) * hits / (hits + (negatives >= threshold).sum())
        before = recall
    return total


def test_auroc_is_the_share_of_pairs() -> None:
    known, unknown = np.array([3.0, 2.0, 2.0]), np.array([2.0, 1.0])
    pairs = [(a > b) + (a == b) / 2 for a in known for b in unknown]
    assert metrics(known, unknown)["auroc"] == pytest.approx(100 * np.mean(pairs))


def test_perfect_and_inverted_scores() -> None:
    known, unknown = np.arange(10, 20.0), np.arange(10.0)
    perfect = {"auroc": 100, "aupr": 100, "aupr_out": 100, "fpr95": 0}
    assert metrics(known, unknown) == pytest.approx(perfect)
    worst = metrics(unknown, known)
    assert worst["auroc"] == 0 and worst["fpr95"] == 100


def test_nan_scores_count_as_unknown() -> None:
    found = metrics(np.array([1.0, 2.0]), np.array([np.nan, 0.0]))
    assert found["auroc"] == 100 and found["fpr95"] == 0


def test_average_precision_by_hand() -> None:
    # Ranks: + - + : precision 1 at recall 1/2, 2/3 at recall 1.
    found = metrics(np.array([3.0, 1.0]), np.array([2.0]))
    assert found["aupr"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def records(**values) -> Records:
    count = len(next(iter(values.values())))
    rest = {name: np.zeros(count) for name in ("image", "part", "label", *SCORES)}
    return Records("x", rest | {name: np.array(value) for name, value in values.items()})


def test_low_entropy_counts_as_known() -> None:
    """Low entropy, high confidence, high energy (logsumexp): each alone tells the two sets apart."""
    known = records(confidence=[0.9, 0.8], energy=[9.0, 8.0], entropy=[0.1, 0.2])
    unknown = records(confidence=[0.3, 0.2], energy=[3.0, 2.0], entropy=[0.8, 0.9])
    found = detect(known, unknown)
    assert set(found) == {"max-softmax", "energy", "entropy"}
    assert {one["auroc"] for one in found.values()} == {100.0}
    assert {one["auroc"] for one in detect(unknown, known).values()} == {0.0}
