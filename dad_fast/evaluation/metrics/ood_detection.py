"""Detection of images of unknown classes by the model's confidence.

Each score is higher for known images. The images of the in-distribution suite are the positives:
  AUROC   probability that one of them has a higher score than an unknown image; ties count half
  AUPR    area under precision over recall, as average precision; AUPR-out with the unknown images
          as the positives
  FPR95   share of the unknown images above the highest threshold that passes 95 % of the known ones

Scores: max-softmax (Hendrycks & Gimpel 2017, arXiv 1610.02136), energy (Liu et al. 2020,
arXiv 2010.03759), negative entropy.
"""

from __future__ import annotations

import numpy as np

from dad_fast.evaluation.metrics.predictions import Records

METRICS = ("auroc", "aupr", "aupr_out", "fpr95")
# Score: field of the records and its sign.
_FIELDS = {"max-softmax": ("confidence", 1), "energy": ("energy", 1), "entropy": ("entropy", -1)}
_LARGEST = np.finfo(np.float64).max


def detect(known: Records, unknown: Records) -> dict[str, dict[str, float]]:
    """Return AUROC, AUPR, AUPR-out and FPR95 of each score, in percent."""
    return {
        name: metrics(sign * known[field], sign * unknown[field])
        for name, (field, sign) in _FIELDS.items()
    }


def metrics(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """Return METRICS of the scores of known and unknown images, float [N] and [M].

    Scores that are not numbers count as the lowest: not known.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    scores = np.concatenate([known, unknown]).astype(np.float64)
    scores = np.nan_to_num(scores, nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
    is_known = np.arange(len(scores)) < len(known)
    passed_unknown, passed_known, _ = roc_curve(is_known, scores, drop_intermediate=False)
    return {
        "auroc": 100 * float(roc_auc_score(is_known, scores)),
        "aupr": 100 * float(average_precision_score(is_known, scores)),
        "aupr_out": 100 * float(average_precision_score(~is_known, -scores)),
        "fpr95": 100 * float(passed_unknown[np.argmax(passed_known >= 0.95)]),
    }
