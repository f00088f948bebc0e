"""Comparison of two models on the same images: agreement and paired tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from dad_fast.errors import DataError
from dad_fast.evaluation.metrics.intervals import mean_interval
from dad_fast.evaluation.metrics.predictions import Records


def agreement(a: Records, b: Records) -> float:
    """Return the share of rows with the same predicted class, in percent.

    Both models must have the same class list. Predictions that are not numbers never agree.
    """
    check_same_images("", a, b)
    return 100 * float(((a["prediction"] == b["prediction"]) & (a["prediction"] >= 0)).mean())


def compare(name: str, a: Records, b: Records) -> dict[str, Any]:
    """Compare the accuracy of `a` and `b` on a suite, with a paired test of their difference.

    difference: top-1 of a minus b, in points, with its 95 % interval (percentile bootstrap over
    images; both models' results on an image are drawn together, and an image under several
    corruptions counts once).
    p_value: McNemar's exact test, two-sided, of the images that only one of them gets right. It
    takes each row as an independent trial, so it is None over several parts (corruptions or
    severities of the same images).

    nll, brier: their differences over the images for which both models have finite logits.
    non_finite: the number of other images.

    Raises DataError where they were evaluated on different images.
    """
    check_same_images(name, a, b)
    right_a, right_b = a["correct"], b["correct"]
    only_a = int((right_a > right_b).sum())
    only_b = int((right_b > right_a).sum())
    _, place = np.unique(a["image"], return_inverse=True)

    def by_image(field: str) -> np.ndarray:
        return np.bincount(place, weights=a[field] - b[field]) / np.bincount(place)  # [images]

    top1 = 100 * by_image("correct")
    return {
        "num_images": len(top1),
        "top1": [100 * float(right_a.mean()), 100 * float(right_b.mean())],
        **_difference(top1),
        "nll": _difference(by_image("nll")),
        "brier": _difference(by_image("brier")),
        "non_finite": int(np.isnan(by_image("nll")).sum()),
        "only_first": only_a,
        "only_second": only_b,
        "p_value": mcnemar(only_a, only_b) if len(top1) == len(right_a) else None,
    }


def _difference(each: np.ndarray) -> dict[str, Any]:
    """Return the mean of the finite values and its interval; nothing where there are none."""
    each = each[np.isfinite(each)]
    if not len(each):
        return {}
    return {"difference": float(each.mean()), "interval": list(mean_interval(each))}


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, a binomial test with p = 1/2."""
    from scipy.stats import binomtest

    trials = only_a + only_b
    return float(binomtest(only_a, trials).pvalue) if trials else 1.0


def check_same_images(name: str, a: Records, b: Records) -> None:
    """Raise DataError unless the rows of both are of the same images in the same order."""
    same_rows = all(np.array_equal(a[field], b[field]) for field in ("image", "part"))
    if a.source == b.source and same_rows:
        return
    what = f"{len(a):,} and {len(b):,} rows" if len(a) != len(b) else "other files"
    raise DataError(
        f"{name or 'agreement'}: the two models were not evaluated on the same images ({what}); "
        "evaluate them again with the same --suite"
    )
