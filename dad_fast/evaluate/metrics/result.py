"""The metrics of one model on one suite."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dad_fast.evaluate.metrics.image_scores import confidence_bins, summarise
from dad_fast.evaluate.metrics.intervals import interval, mean_interval, resampled
from dad_fast.evaluate.metrics.predictions import Records

MOST_ROWS = 300_000  # `with_intervals` draws each of them 2000 times


@dataclass(frozen=True)
class Result:
    """Metrics of one model on one suite. top1, top5, ece and their kin in percent, nll in nats, brier from 0 to 2; top5 is None where
    fewer than 6 outputs compete.

    Over several parts (severities, corruptions) every metric is taken over all images of all parts together, which for top-1 is the
    mean; `by_severity` has each severity's top-1. num_images counts the suite's images, each once; `skipped` could not be read.
    """

    name: str
    num_images: int
    top1: float
    top5: float | None
    ece: float
    nll: float
    skipped: int = 0
    by_severity: tuple[float, ...] = ()
    top1_interval: tuple[float, float] | None = (
        None  # 95 %, bootstrap over images; over parts an image counts as one
    )
    ece_adaptive: float | None = None  # 15 bins of equal numbers of images
    brier: float | None = None
    reliability: dict[str, list[Any]] | None = (
        None  # count, confidence, accuracy of 15 equal bins, as fractions
    )
    ece_interval: tuple[float, float] | None = None  # these three where `with_intervals` made them
    nll_interval: tuple[float, float] | None = None
    brier_interval: tuple[float, float] | None = None
    agreement: float | None = (
        None  # share of images on which the model and the teacher say the same class, %
    )
    protocol: str = ""  # how an image becomes pixels, which outputs compete, and what is missing
    mce: float | None = None  # mean corruption error relative to AlexNet's, %
    mce_interval: tuple[float, float] | None = None
    by_corruption: dict[str, dict[str, Any]] | None = (
        None  # top-1 by severity, and the corruption error
    )
    records: Records | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, without the records."""
        found = asdict(replace(self, records=None))
        del found["records"]
        return found


def make_result(name: str, records: Records, num_outputs: int, **facts: Any) -> Result:
    """`records` as a Result; `facts` are its further fields. num_outputs: how many outputs compete."""
    found = summarise(records.scores, num_outputs)
    images, place = np.unique(records["image"], return_inverse=True)
    each = np.bincount(place, weights=records["correct"]) / np.bincount(
        place
    )  # [images]: the share of parts in which it is right
    low, high = mean_interval(each)
    tops = tuple(
        100 * float(records.part(part)["correct"].mean()) for part in np.unique(records["part"])
    )
    facts = {"by_severity": tops if len(tops) > 1 else ()} | facts
    return Result(
        name=name,
        num_images=len(images),
        top1_interval=(100 * low, 100 * high),
        records=records,
        **found,
        **facts,
    )


def with_intervals(result: Result) -> Result:
    """`result` with the intervals of ECE, NLL and Brier score; as it is above MOST_ROWS images times parts.

    The ECE of a resample is never below what chance alone makes of as many images, so that its interval lies a little high.
    """
    records = result.records
    if records is None or len(records) > MOST_ROWS:
        return result
    images, place = np.unique(records["image"], return_inverse=True)
    bins = confidence_bins(records["confidence"])
    gap = records["correct"] - records["confidence"]
    found: dict[str, list[float]] = {"ece": [], "nll": [], "brier": []}
    for drawn in resampled(len(images)):
        weights = np.bincount(drawn, minlength=len(images))[
            place
        ]  # how often each row is in the resample
        found["ece"].append(
            100 * float(np.abs(np.bincount(bins, weights=weights * gap)).sum() / weights.sum())
        )
        found["nll"].append(float(weights @ records["nll"] / weights.sum()))
        found["brier"].append(float(weights @ records["brier"] / weights.sum()))
    made = {f"{name}_interval": interval(np.array(values)) for name, values in found.items()}
    return replace(result, **made)  # type: ignore[arg-type]
