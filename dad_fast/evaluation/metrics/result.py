"""Result: the metrics of one model on one suite."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dad_fast.evaluation.metrics.confusion import confusion
from dad_fast.evaluation.metrics.image_scores import (
    class_accuracies,
    confidence_bins,
    is_finite,
    summarise,
)
from dad_fast.evaluation.metrics.intervals import interval, mean_interval, resampled
from dad_fast.evaluation.metrics.predictions import Records

# Limit of `with_intervals`, which draws each row 2000 times.
MOST_ROWS = 300_000


@dataclass(frozen=True)
class Result:
    """Metrics of one model on one suite.

    Accuracies, calibration errors, agreement and mCE are in percent, nll is in nats, brier from 0
    to 2. Over several parts (severities, corruptions) every metric is taken over all images of all
    parts.

    num_images: images of the suite, each counted once. skipped: unreadable images.
    non_finite: images with non-finite logits in any part: wrong, and left out of ece, nll, brier.
    per_class: top-1 of each of the model's classes, in their order; None without images.
    balanced_accuracy: its mean over the classes with images.
    top5: None where fewer than 6 outputs compete.
    by_severity: top-1 of each severity.
    *_interval: 95 %, bootstrap over images; over parts an image counts once. Those of ece, nll and
        brier are made by `with_intervals`.
    ece_adaptive: over 15 bins of equal numbers of images.
    reliability: count, confidence and accuracy of 15 equal bins, as fractions.
    agreement: share of images on which the model and the teacher predict the same class.
    protocol: preprocessing, competing outputs and missing images, in words.
    mce: mean corruption error relative to AlexNet's.
    by_corruption: top-1 by severity, and the corruption error.
    confusion: wrong predictions by class, see `metrics.confusion`.
    """

    name: str
    num_images: int
    top1: float
    top5: float | None
    ece: float
    nll: float
    skipped: int = 0
    non_finite: int = 0
    balanced_accuracy: float | None = None
    per_class: list[float | None] | None = None
    by_severity: tuple[float, ...] = ()
    top1_interval: tuple[float, float] | None = None
    ece_adaptive: float | None = None
    brier: float | None = None
    reliability: dict[str, list[Any]] | None = None
    ece_interval: tuple[float, float] | None = None
    nll_interval: tuple[float, float] | None = None
    brier_interval: tuple[float, float] | None = None
    agreement: float | None = None
    protocol: str = ""
    mce: float | None = None
    mce_interval: tuple[float, float] | None = None
    by_corruption: dict[str, dict[str, Any]] | None = None
    confusion: dict[str, Any] | None = None
    records: Records | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, without the records."""
        found = asdict(replace(self, records=None))
        del found["records"]
        return found


def make_result(
    name: str, records: Records, num_outputs: int, num_classes: int, **facts: Any
) -> Result:
    """Compute the metrics of `records`.

    num_outputs: competing outputs. num_classes: the model's classes. facts: further fields.
    """
    found = summarise(records.scores, num_outputs)
    images, place = np.unique(records["image"], return_inverse=True)
    # [images]: the share of parts in which the prediction is right.
    each = np.bincount(place, weights=records["correct"]) / np.bincount(place)
    low, high = mean_interval(each)
    tops = tuple(
        100 * float(records.part(part)["correct"].mean()) for part in np.unique(records["part"])
    )
    per_class = class_accuracies(records["label"], records["correct"], num_classes)
    with_images = [accuracy for accuracy in per_class if accuracy is not None]
    facts = {"by_severity": tops if len(tops) > 1 else ()} | facts
    return Result(
        name=name,
        num_images=len(images),
        top1_interval=(100 * low, 100 * high),
        non_finite=len(np.unique(records["image"][~is_finite(records.values)])),
        balanced_accuracy=float(np.mean(with_images)) if with_images else None,
        per_class=per_class,
        confusion=confusion(records),
        records=records,
        **found,
        **facts,
    )


def with_intervals(result: Result) -> Result:
    """Add the intervals of ECE, NLL and Brier score, unless there are more than MOST_ROWS rows.

    Chance alone gives a resample some ECE, so that the interval of the ECE lies a little high.
    """
    records = result.records
    if records is None or len(records) > MOST_ROWS:
        return result
    records = records.taken(is_finite(records.values))
    if not len(records):
        return result
    images, place = np.unique(records["image"], return_inverse=True)
    bins = confidence_bins(records["confidence"])
    gap = records["correct"] - records["confidence"]
    found: dict[str, list[float]] = {"ece": [], "nll": [], "brier": []}
    for drawn in resampled(len(images)):
        # Number of times that each row is in the resample.
        weights = np.bincount(drawn, minlength=len(images))[place]
        gaps = np.abs(np.bincount(bins, weights=weights * gap)).sum()
        found["ece"].append(100 * float(gaps / weights.sum()))
        found["nll"].append(float(weights @ records["nll"] / weights.sum()))
        found["brier"].append(float(weights @ records["brier"] / weights.sum()))
    made = {f"{name}_interval": interval(np.array(values)) for name, values in found.items()}
    return replace(result, **made)  # type: ignore[arg-type]
