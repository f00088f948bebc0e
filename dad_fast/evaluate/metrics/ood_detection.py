"""Detection of images of classes that the model does not know, by how sure it is.

Each score is higher for what looks known. The images of the in-distribution suite are the positives:
  AUROC   probability that one of them has a higher score than an unknown image, equal scores counting half
  AUPR    area under precision over recall, as average precision; AUPR-out with the unknown images as the positives
  FPR95   share of the unknown images that pass at the highest threshold which still passes 95 % of the known ones

Scores: max-softmax (Hendrycks & Gimpel 2017, arXiv 1610.02136), energy (Liu et al. 2020, arXiv 2010.03759), negative entropy.
"""

from __future__ import annotations

import numpy as np

from dad_fast.evaluate.metrics.predictions import Records

METRICS = ("auroc", "aupr", "aupr_out", "fpr95")
_SIGN = {
    "max-softmax": ("confidence", 1),
    "energy": ("energy", 1),
    "entropy": ("entropy", -1),
}  # score: (field of the records, sign)


def detect(known: Records, unknown: Records) -> dict[str, dict[str, float]]:
    """For each score AUROC, AUPR, AUPR-out and FPR95, in percent."""
    return {
        name: metrics(sign * known[field], sign * unknown[field])
        for name, (field, sign) in _SIGN.items()
    }


def metrics(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """Of the scores of known and unknown images, float [N] and [M]. Scores that are not numbers count as the lowest: not known."""
    known, unknown = (
        np.nan_to_num(scores.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        for scores in (known, unknown)
    )
    ordered = np.sort(unknown)
    below = np.searchsorted(ordered, known, side="left")
    ties = np.searchsorted(ordered, known, side="right") - below
    threshold = np.sort(known)[::-1][int(np.ceil(0.95 * len(known))) - 1]
    return {
        "auroc": 100 * float((below + ties / 2).mean() / len(unknown)),
        "aupr": 100 * average_precision(known, unknown),
        "aupr_out": 100 * average_precision(-unknown, -known),
        "fpr95": 100 * float((unknown >= threshold).mean()),
    }


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Sum over thresholds of precision times the recall that is gained there, from the highest score down; equal scores are one."""
    scores = np.concatenate([positives, negatives])
    positive = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(positive[order])
    last = np.flatnonzero(
        np.append(scores[1:] != scores[:-1], True)
    )  # where a threshold's run of equal scores ends
    precision, gained = hits[last] / (last + 1), np.diff(hits[last], prepend=0)
    return float((precision * gained).sum() / len(positives))
