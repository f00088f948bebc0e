"""Two models on the same images: how often they agree, and whether one is better."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dad_fast.errors import DataError
from dad_fast.evaluate.metrics.intervals import mean_interval
from dad_fast.evaluate.metrics.predictions import Records


def agreement(a: Records, b: Records) -> float:
    """Share of the rows on which both say the same class, in percent; of models with the same class list."""
    check_same_images("", a, b)
    return 100 * float(((a["prediction"] == b["prediction"]) & (a["prediction"] >= 0)).mean())


def compare(name: str, a: Records, b: Records) -> dict[str, Any]:
    """Accuracy of `a` and `b` on a suite, and a paired test of their difference.

    difference: top-1 of a minus b, in points, with its 95 % interval (percentile bootstrap over images, both models' answers to an
    image drawn together; an image under several corruptions is one).
    p_value: McNemar's exact test, two-sided, of the images that only one of them gets right. It takes each row as a trial of its own,
    so there is none over several parts (corruptions or severities of the same images).

    Raises DataError where they were not shown the same images.
    """
    check_same_images(name, a, b)
    right_a, right_b = a["correct"], b["correct"]
    only_a, only_b = int((right_a > right_b).sum()), int((right_b > right_a).sum())
    _, place = np.unique(a["image"], return_inverse=True)

    def paired(field: str, scale: float) -> tuple[np.ndarray, dict[str, Any]]:
        each = (
            scale * np.bincount(place, weights=a[field] - b[field]) / np.bincount(place)
        )  # [images]
        known = bool(np.isfinite(each).all())
        return each, {
            "difference": float(each.mean()),
            "interval": list(mean_interval(each)),
        } if known else {}

    each, top1 = paired("correct", 100.0)
    return {
        "num_images": len(each),
        "top1": [100 * float(right_a.mean()), 100 * float(right_b.mean())],
        **top1,
        "nll": paired("nll", 1.0)[1],
        "brier": paired("brier", 1.0)[1],
        "only_first": only_a,
        "only_second": only_b,
        "p_value": mcnemar(only_a, only_b) if len(each) == len(right_a) else None,
    }


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test: 2 * P(X <= min(only_a, only_b)), X ~ Binomial(only_a + only_b, 1/2), 1 at most."""
    trials, least = only_a + only_b, min(only_a, only_b)
    log_terms = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        - trials * math.log(2)
        for k in range(least + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, log_terms)))


def check_same_images(name: str, a: Records, b: Records) -> None:
    """DataError where the rows of two records are not of the same images in the same order."""
    if a.source == b.source and all(
        np.array_equal(a[field], b[field]) for field in ("image", "part")
    ):
        return
    what = f"{len(a):,} and {len(b):,} rows" if len(a) != len(b) else "other files"
    raise DataError(
        f"{name or 'agreement'}: the two models were not judged on the same images ({what}); judge them again with the same --suite"
    )
