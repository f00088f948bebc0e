"""The confusion of a suite's classes, against scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dad_fast.evaluation.metrics.confusion import MAX_CLASSES, MAX_PAIRS, confusion
from dad_fast.evaluation.metrics.image_scores import SCORES
from dad_fast.evaluation.metrics.predictions import Records


def records_of(labels: np.ndarray, predictions: np.ndarray) -> Records:
    count = len(labels)
    values = {name: np.zeros(count) for name in SCORES}
    values |= {
        "image": np.arange(count),
        "part": np.zeros(count, np.int64),
        "label": labels,
        "prediction": predictions.astype(np.float64),
        "correct": (labels == predictions).astype(np.float64),
    }
    return Records("x", values)


def test_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    labels, predictions = random.integers(0, 7, 500), random.integers(0, 9, 500)
    found = confusion(records_of(labels, predictions))
    expected = metrics.confusion_matrix(labels, predictions, labels=range(9))
    made = np.zeros((9, 9), np.int64)
    for label, row in found["wrong"].items():
        assert list(row.values()) == sorted(row.values(), reverse=True)
        for prediction, images in row.items():
            made[int(label), int(prediction)] = images
    for label, images in found["images"].items():
        made[int(label), int(label)] = images - made[int(label)].sum()
    assert found["all"] and np.array_equal(made, expected)
    assert json.loads(json.dumps(found)) == found


def test_of_many_classes_only_the_most_frequent_pairs_are_kept():
    classes = MAX_CLASSES + 100
    labels = np.arange(classes).repeat(2)
    predictions = labels.copy()
    predictions[::2] = (labels[::2] + 1) % classes
    # Both images of class 7 are taken for class 9.
    predictions[14:16] = 9
    found = confusion(records_of(labels, predictions))
    assert not found["all"]
    assert next(iter(found["wrong"].items())) == ("7", {"9": 2})
    assert sum(map(len, found["wrong"].values())) == MAX_PAIRS
    assert found["images"] == dict.fromkeys(sorted(found["wrong"], key=int), 2)


def test_images_without_a_label_or_prediction():
    labels, predictions = np.array([-1, -1, 3, 3]), np.array([0, 1, -1, 3])
    assert confusion(records_of(labels, predictions)) == {
        "all": True,
        "images": {"3": 2},
        "wrong": {},
    }
    assert confusion(records_of(labels[:2], predictions[:2])) is None
