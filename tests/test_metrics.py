"""Metrics against independent numpy computations and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dad_fast.evaluate.metrics import batch_sums, finish


def reference(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Loops over images and bins, in float64."""
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")
    hit = order[:, 0] == labels
    confidence = probabilities.max(1)
    ece = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return {
        "num_images": len(labels),
        "top1": 100 * hit.mean(),
        "top5": 100 * np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)]),
        "ece": 100 * ece,
        "nll": -np.mean([math.log(row[label]) for label, row in zip(labels, probabilities, strict=True)]),
    }


@pytest.mark.parametrize("num_classes", [6, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_numpy_in_any_split_into_batches(num_classes, dtype):
    generator = torch.Generator().manual_seed(num_classes)
    labels = torch.randint(num_classes, (257,), generator=generator)
    logits = torch.randn(257, num_classes, generator=generator) * 3
    logits[torch.arange(257), labels] += 2 * math.log(num_classes) * torch.rand(257, generator=generator)
    logits = logits.to(dtype)
    sums = sum(batch_sums(logits[i : i + 50], labels[i : i + 50]) for i in range(0, 257, 50))
    found, expected = finish(sums, num_classes), reference(logits.double().numpy(), labels.numpy())
    assert 5 < found["top1"] < 95 and found["ece"] > 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_known_values():
    # Three images, confidence 0.8 each, two right: |2/3 - 0.8| and -(2 ln 0.8 + ln 0.2) / 3.
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2]], dtype=torch.float64))
    found = finish(batch_sums(logits, torch.tensor([0, 1, 1])), 2)
    assert found["num_images"] == 3 and found["top5"] is None
    assert found["top1"] == pytest.approx(200 / 3)
    assert found["ece"] == pytest.approx(100 * (0.8 - 2 / 3))
    assert found["nll"] == pytest.approx(-(2 * math.log(0.8) + math.log(0.2)) / 3)


def test_equal_logits_rank_by_class_number():
    found = finish(batch_sums(torch.zeros(10, 10), torch.arange(10)), 10)
    assert (found["top1"], found["top5"]) == (10.0, 50.0)
    assert found["ece"] == pytest.approx(0) and found["nll"] == pytest.approx(math.log(10))


def test_rows_that_are_not_finite_count_as_wrong():
    logits = torch.eye(6) * 100
    logits[0] = float("nan")
    logits[1, 1] = float("inf")
    found = finish(batch_sums(logits, torch.arange(6)), 6)
    assert found["top1"] == pytest.approx(100 * 4 / 6) and found["ece"] == pytest.approx(0)
    assert math.isnan(found["nll"])


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        finish(batch_sums(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), 3)
