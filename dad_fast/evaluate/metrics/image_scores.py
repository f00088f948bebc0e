"""What is measured of each image, on the device, and the metrics of many images, in float64 on the CPU.

Accuracy   top-k: the label is among the k largest logits
ECE        sum over bins of |bin| / N * |accuracy(bin) - confidence(bin)|, confidence = the largest softmax output; 15 bins
           ((m-1)/15, m/15] (Guo et al. 2017, arXiv 1706.04599)
adaptive   the same over 15 bins of equal numbers of images (Nixon et al. 2019, arXiv 1904.01685); equal confidences share a bin
NLL        mean of -log p(label), in nats
Brier      mean of sum over classes of (p(class) - [class is the label])^2, from 0 to 2

Where several outputs count as right (ObjectNet), p(label) is their sum: they are one class to the NLL and the Brier score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 15
# The columns of `image_scores`; the last two are scores for the detection of images of other classes.
SCORES = ("prediction", "correct", "top5", "confidence", "nll", "brier", "energy", "entropy")


def image_scores(
    logits: Tensor, labels: Tensor, columns: Tensor | None = None, accepted: Tensor | None = None
) -> Tensor:
    """float64 [B, 8] on the device of the logits: the columns of SCORES for every image.

    prediction is an output of the model (-1 for a row that is not finite); correct and top5 are 0 or 1; energy is
    logsumexp(logits), the negative energy of Liu et al. 2020 (arXiv 2010.03759); entropy is that of the softmax, in nats.

    logits: float [B, C].
    labels: int64 [B]. Without `accepted` the place of the right output among those that compete; -1: no output is right, and nll
        and brier are not numbers.
    columns: int64 [K], the outputs that compete; None = all. The others are as if the model had them not.
    accepted: bool [G, K], the competing outputs that are right for each label 0 … G-1.

    Equal logits rank by class number. A row that is not finite counts as wrong, with confidence 0, and its other scores are not numbers.
    """
    logits = (logits if columns is None else logits.index_select(1, columns)).double()
    classes = torch.arange(logits.shape[1], device=logits.device)
    known = labels >= 0
    right = (
        classes == labels[:, None]
        if accepted is None
        else accepted[labels.clamp(min=0)] & known[:, None]
    )  # [B, K]
    finite = logits.isfinite().all(dim=1)
    best = logits.amax(dim=1, keepdim=True)  # [B, 1]
    own = logits.where(right, -torch.inf).amax(dim=1, keepdim=True)  # [B, 1]
    first = classes.where(right & (logits == own), len(classes)).amin(dim=1, keepdim=True)
    rank = ((logits > own) | ((logits == own) & (classes < first))).sum(dim=1)
    top1, top5 = ((rank < k) & finite & known for k in (1, 5))
    prediction = classes.where(logits == best, len(classes) - 1).amin(dim=1)
    if columns is not None:
        prediction = columns[prediction]
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    p_right = (p * right).sum(dim=1)
    nll = -log_p.where(right, -torch.inf).logsumexp(dim=1)
    brier = (p * p * ~right).sum(dim=1) + (1 - p_right) ** 2
    judged = finite & known
    columns_of = (
        prediction.where(finite, -1),
        top1,
        top5,
        p.amax(dim=1).where(finite, 0.0),
        nll.where(judged, torch.nan),
        brier.where(judged, torch.nan),
        logits.logsumexp(dim=1).where(finite, torch.nan),
        torch.special.entr(p).sum(dim=1).where(finite, torch.nan),
    )
    return torch.stack([column.double() for column in columns_of], dim=1)


def summarise(scores: dict[str, np.ndarray], num_outputs: int) -> dict[str, Any]:
    """The metrics of many images: top1, top5, ece, ece_adaptive in percent, nll in nats, brier, and the reliability diagram.

    scores: the columns of `image_scores`, float64 [N]. num_outputs: how many outputs compete; top5 is None below 6, where it says nothing.
    Raises ValueError where there is no image.
    """
    correct, confidence = scores["correct"], scores["confidence"]
    if not len(correct):
        raise ValueError("no image was counted")
    bins = confidence_bins(confidence)
    edges = np.quantile(confidence, np.linspace(0, 1, NUM_BINS + 1))
    even = np.searchsorted(edges[1:-1], confidence)
    return {
        "top1": 100 * float(correct.mean()),
        "top5": 100 * float(scores["top5"].mean()) if num_outputs > 5 else None,
        "ece": 100 * _calibration_error(bins, correct, confidence),
        "ece_adaptive": 100 * _calibration_error(even, correct, confidence),
        "nll": float(scores["nll"].mean()),
        "brier": float(scores["brier"].mean()),
        "reliability": _reliability(bins, correct, confidence),
    }


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, 0 … 14: ((m-1)/15, m/15] for m = 1 … 15."""
    return (np.ceil(confidence * NUM_BINS).astype(np.int64) - 1).clip(0, NUM_BINS - 1)


def _calibration_error(bins: np.ndarray, correct: np.ndarray, confidence: np.ndarray) -> float:
    hits, sure = (
        np.bincount(bins, weights=values, minlength=NUM_BINS) for values in (correct, confidence)
    )
    return float(np.abs(hits - sure).sum() / len(correct))


def _reliability(
    bins: np.ndarray, correct: np.ndarray, confidence: np.ndarray
) -> dict[str, list[Any]]:
    """Of each of the 15 equal bins its number of images, mean confidence and accuracy (fractions; 0 where the bin is empty)."""
    count, sure, hits = (
        np.bincount(bins, weights=w, minlength=NUM_BINS)
        for w in (np.ones_like(correct), confidence, correct)
    )
    each = np.maximum(count, 1)
    return {
        "count": count.astype(int).tolist(),
        "confidence": (sure / each).tolist(),
        "accuracy": (hits / each).tolist(),
    }
