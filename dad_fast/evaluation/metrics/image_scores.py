"""Scores of each image, on the device, and metrics of many images, in float64 on the CPU.

Accuracy   top-k: the label is among the k largest logits
ECE        sum over bins of |bin| / N * |accuracy(bin) - confidence(bin)|, confidence = the largest
           softmax output; 15 bins ((m-1)/15, m/15] (Guo et al. 2017, arXiv 1706.04599)
adaptive   the same over 15 bins of equal numbers of images (Nixon et al. 2019, arXiv 1904.01685);
           equal confidences share a bin
NLL        mean of -log p(label), in nats
Brier      mean of sum over classes of (p(class) - [class is the label])^2, from 0 to 2

Where several outputs are right (ObjectNet), p(label) is their sum: the NLL and the Brier score
treat them as one class.

An image with non-finite logits counts as wrong; the other metrics are over the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 15
_NO_CALIBRATION = {"ece": math.nan, "ece_adaptive": math.nan}
# Columns of `image_scores`; the last two are for the detection of images of unknown classes.
SCORES = ("prediction", "correct", "top5", "confidence", "nll", "brier", "energy", "entropy")


def image_scores(
    logits: Tensor, labels: Tensor, columns: Tensor | None = None, accepted: Tensor | None = None
) -> Tensor:
    """Return the columns of SCORES for every image, float64 [B, 8] on the device of the logits.

    prediction is an output of the model (-1 for a row that is not finite); correct and top5 are 0
    or 1; energy is logsumexp(logits), the negative energy of Liu et al. 2020 (arXiv 2010.03759);
    entropy is that of the softmax, in nats.

    logits: float [B, C].
    labels: int64 [B]. Without `accepted`, the position of the right output among those that
        compete. -1: no output is right, and nll and brier are NaN.
    columns: int64 [K], the outputs that compete; None = all. The others are ignored.
    accepted: bool [G, K], the competing outputs that are right for each label 0 … G-1.

    Equal logits rank by class number. A row that is not finite counts as wrong, with confidence 0;
    its other scores are NaN.
    """
    logits = (logits if columns is None else logits.index_select(1, columns)).double()
    classes = torch.arange(logits.shape[1], device=logits.device)
    known = labels >= 0
    if accepted is None:
        right = classes == labels[:, None]  # [B, K]
    else:
        right = accepted[labels.clamp(min=0)] & known[:, None]
    finite = logits.isfinite().all(dim=1)
    best = logits.amax(dim=1, keepdim=True)  # [B, 1]
    own = logits.where(right, -torch.inf).amax(dim=1, keepdim=True)  # [B, 1]
    first = classes.where(right & (logits == own), len(classes)).amin(dim=1, keepdim=True)
    rank = ((logits > own) | ((logits == own) & (classes < first))).sum(dim=1)
    scored = finite & known
    top1 = (rank < 1) & scored
    top5 = (rank < 5) & scored
    prediction = classes.where(logits == best, len(classes) - 1).amin(dim=1)
    if columns is not None:
        prediction = columns[prediction]
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    p_right = (p * right).sum(dim=1)
    nll = -log_p.where(right, -torch.inf).logsumexp(dim=1)
    brier = (p * p * ~right).sum(dim=1) + (1 - p_right) ** 2
    scores = (
        prediction.where(finite, -1),
        top1,
        top5,
        p.amax(dim=1).where(finite, 0.0),
        nll.where(scored, torch.nan),
        brier.where(scored, torch.nan),
        logits.logsumexp(dim=1).where(finite, torch.nan),
        torch.special.entr(p).sum(dim=1).where(finite, torch.nan),
    )
    return torch.stack([column.double() for column in scores], dim=1)


def summarise(scores: dict[str, np.ndarray], num_outputs: int) -> dict[str, Any]:
    """Return the metrics of many images and the reliability diagram.

    top1, top5, ece and ece_adaptive are in percent, nll is in nats, brier from 0 to 2. Images with
    non-finite logits are wrong; ece, ece_adaptive, nll, brier and the diagram leave them out, and
    are NaN where no other image is left.

    scores: the columns of `image_scores`, float64 [N]. num_outputs: the number of outputs that
    compete; top5 is None below 6, where it is trivial. Raises ValueError without images.
    """
    if not len(scores["correct"]):
        raise ValueError("no image was counted")
    finite = is_finite(scores)
    correct, confidence = scores["correct"][finite], scores["confidence"][finite]
    calibration = _calibration(correct, confidence) if len(correct) else dict(_NO_CALIBRATION)
    return {
        "top1": 100 * float(scores["correct"].mean()),
        "top5": 100 * float(scores["top5"].mean()) if num_outputs > 5 else None,
        **calibration,
        "nll": float(scores["nll"][finite].mean()) if len(correct) else math.nan,
        "brier": float(scores["brier"][finite].mean()) if len(correct) else math.nan,
        "reliability": _reliability(confidence_bins(confidence), correct, confidence),
    }


def is_finite(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which images have finite logits, bool [N]. scores: the columns of `image_scores`."""
    return scores["prediction"] >= 0


def class_accuracies(
    labels: np.ndarray, correct: np.ndarray, num_classes: int
) -> list[float | None]:
    """Return the accuracy of each class in percent; None for a class without images.

    Their mean over the classes with images is the balanced accuracy (macro-averaged recall).

    labels: int [N], -1 for an image of no class, which is left out. correct: 0 or 1, [N].
    """
    known = labels >= 0
    count = np.bincount(labels[known], minlength=num_classes)
    right = np.bincount(labels[known], weights=correct[known], minlength=num_classes)
    return [
        100 * float(hits) / int(total) if total else None
        for hits, total in zip(right, count, strict=True)
    ]


def _calibration(correct: np.ndarray, confidence: np.ndarray) -> dict[str, float]:
    bins = confidence_bins(confidence)
    edges = np.quantile(confidence, np.linspace(0, 1, NUM_BINS + 1))
    even = np.searchsorted(edges[1:-1], confidence)
    return {
        "ece": 100 * _calibration_error(bins, correct, confidence),
        "ece_adaptive": 100 * _calibration_error(even, correct, confidence),
    }


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """Return the bin of each confidence, 0 … 14: ((m-1)/15, m/15] for m = 1 … 15."""
    return (np.ceil(confidence * NUM_BINS).astype(np.int64) - 1).clip(0, NUM_BINS - 1)


def _calibration_error(bins: np.ndarray, correct: np.ndarray, confidence: np.ndarray) -> float:
    correct_sum = np.bincount(bins, weights=correct, minlength=NUM_BINS)
    confidence_sum = np.bincount(bins, weights=confidence, minlength=NUM_BINS)
    return float(np.abs(correct_sum - confidence_sum).sum() / len(correct))


def _reliability(
    bins: np.ndarray, correct: np.ndarray, confidence: np.ndarray
) -> dict[str, list[Any]]:
    """Return number of images, mean confidence and accuracy of each bin (fractions; 0 if empty)."""
    count = np.bincount(bins, minlength=NUM_BINS)
    confidence_sum = np.bincount(bins, weights=confidence, minlength=NUM_BINS)
    correct_sum = np.bincount(bins, weights=correct, minlength=NUM_BINS)
    each = np.maximum(count, 1)
    return {
        "count": count.tolist(),
        "confidence": (confidence_sum / each).tolist(),
        "accuracy": (correct_sum / each).tolist(),
    }
