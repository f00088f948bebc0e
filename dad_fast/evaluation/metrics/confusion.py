"""Confusion: how many images of each class are predicted as which other class."""

from __future__ import annotations

from typing import Any

import numpy as np

from dad_fast.evaluation.metrics.predictions import Records

# With more classes than this, only the most frequent wrong predictions are kept.
MAX_CLASSES = 200
MAX_PAIRS = 100


def confusion(records: Records) -> dict[str, Any] | None:
    """Return the confusion matrix without its zeros and its diagonal; None without labels.

    Keys, with classes as numbers of the model's outputs, in text as JSON has them:
        wrong: {label: {prediction: images}}, most frequent first
        images: {label: images} of the labels, the sums of the matrix' rows
        all: whether `wrong` has every wrong prediction. Above MAX_CLASSES classes it has the
            MAX_PAIRS most frequent pairs, and `images` their labels.

    Over several parts (severities, corruptions) an image counts in each. Images with non-finite
    logits have no prediction: they are in `images` alone.
    """
    known = records["label"] >= 0
    labels = records["label"][known].astype(np.int64)
    if not len(labels):
        return None
    predictions = records["prediction"][known].astype(np.int64)
    is_wrong = (records["correct"][known] == 0) & (predictions >= 0)
    width = int(max(labels.max(), predictions.max())) + 1
    # A pair as one number, which is faster to count than rows of two.
    pairs, counts = np.unique((labels * width + predictions)[is_wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    pairs, counts = pairs[order], counts[order]

    shown, images = np.unique(labels, return_counts=True)
    is_all = len(np.union1d(shown, pairs % width)) <= MAX_CLASSES
    if not is_all:
        pairs, counts = pairs[:MAX_PAIRS], counts[:MAX_PAIRS]
        is_shown = np.isin(shown, pairs // width)
        shown, images = shown[is_shown], images[is_shown]

    by_label: dict[str, dict[str, int]] = {}
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        label, prediction = divmod(pair, width)
        by_label.setdefault(str(label), {})[str(prediction)] = count
    return {
        "all": is_all,
        "images": {str(label): int(count) for label, count in zip(shown, images, strict=True)},
        "wrong": by_label,
    }
