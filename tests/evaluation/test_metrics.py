"""Metrics against independent numpy and scikit-learn computations and known values."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from dad_fast.evaluation.metrics.image_scores import (
    SCORES,
    class_accuracies,
    image_scores,
    summarise,
)
from dad_fast.evaluation.metrics.predictions import Records
from dad_fast.evaluation.metrics.result import make_result, with_intervals
from dad_fast.evaluation.show import notes


def scores(logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> dict[str, np.ndarray]:
    found = image_scores(logits, labels, **kwargs).numpy()
    return {name: found[:, i] for i, name in enumerate(SCORES)}


def metrics(logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> dict:
    return summarise(scores(logits, labels, **kwargs), logits.shape[1])


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
    one_hot = np.eye(logits.shape[1])[labels]
    return {
        "top1": 100 * hit.mean(),
        "top5": 100 * np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)]),
        "ece": 100 * ece,
        "nll": -np.mean(
            [math.log(row[label]) for label, row in zip(labels, probabilities, strict=True)]
        ),
        "brier": ((probabilities - one_hot) ** 2).sum(1).mean(),
    }


def random_case(num_classes: int, count: int = 257) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    labels = torch.randint(num_classes, (count,), generator=generator)
    logits = torch.randn(count, num_classes, generator=generator) * 3
    logits[torch.arange(count), labels] += (
        2 * math.log(num_classes) * torch.rand(count, generator=generator)
    )
    return logits, labels


@pytest.mark.parametrize("num_classes", [6, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_numpy_in_any_split_into_batches(num_classes, dtype):
    logits, labels = random_case(num_classes)
    logits = logits.to(dtype)
    parts = [image_scores(logits[i : i + 50], labels[i : i + 50]) for i in range(0, 257, 50)]
    together = torch.cat(parts).numpy()
    found = summarise({name: together[:, i] for i, name in enumerate(SCORES)}, num_classes)
    expected = reference(logits.double().numpy(), labels.numpy())
    assert 5 < found["top1"] < 95 and found["ece"] > 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_known_values():
    # Three images, confidence 0.8 each, two right: |2/3 - 0.8| and -(2 ln 0.8 + ln 0.2) / 3.
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2]], dtype=torch.float64))
    found = metrics(logits, torch.tensor([0, 1, 1]))
    assert found["top5"] is None
    assert found["top1"] == pytest.approx(200 / 3)
    assert found["ece"] == found["ece_adaptive"] == pytest.approx(100 * (0.8 - 2 / 3))
    assert found["nll"] == pytest.approx(-(2 * math.log(0.8) + math.log(0.2)) / 3)
    assert found["brier"] == pytest.approx((2 * 2 * 0.2**2 + 2 * 0.8**2) / 3)
    diagram = found["reliability"]
    assert diagram["count"] == [0] * 11 + [3] + [0] * 3  # 0.8 is the upper end of (11/15, 12/15]
    assert diagram["confidence"][11] == pytest.approx(0.8) and diagram["accuracy"][
        11
    ] == pytest.approx(2 / 3)


def test_reliability_diagram_reproduces_ece():
    found = metrics(*random_case(10))
    count, sure, right = (
        np.array(found["reliability"][name]) for name in ("count", "confidence", "accuracy")
    )
    assert count.sum() == 257
    assert 100 * (count * abs(sure - right)).sum() / 257 == pytest.approx(found["ece"])


def test_adaptive_bins_equal_scikit_learns():
    calibration = pytest.importorskip("sklearn.calibration")
    logits, labels = random_case(10, 1000)
    of_each = scores(logits, labels)
    accuracy, confidence = calibration.calibration_curve(
        of_each["correct"], of_each["confidence"], n_bins=15, strategy="quantile"
    )
    edges = np.quantile(of_each["confidence"], np.linspace(0, 1, 16))
    share = np.bincount(np.searchsorted(edges[1:-1], of_each["confidence"]), minlength=15) / 1000
    assert share.min() > 0.06  # bins of equal numbers
    expected = 100 * (share * abs(accuracy - confidence)).sum()
    assert metrics(logits, labels)["ece_adaptive"] == pytest.approx(expected)


def test_equal_confidences_share_a_bin():
    """The order of the images must not matter, though most of them are equally sure."""
    generator = np.random.default_rng(0)
    confidence = np.where(generator.random(300) < 0.7, 1.0, generator.random(300))
    of_each = {name: np.zeros(300) for name in SCORES} | {
        "confidence": confidence,
        "correct": generator.random(300) < 0.5,
    }
    found = set()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(300)
        found.add(
            round(
                summarise({name: value[order] for name, value in of_each.items()}, 10)[
                    "ece_adaptive"
                ],
                9,
            )
        )
    assert len(found) == 1


def test_equal_logits_rank_by_class_number():
    found = metrics(torch.zeros(10, 10), torch.arange(10))
    assert (found["top1"], found["top5"]) == (10.0, 50.0)
    assert found["ece"] == pytest.approx(0) and found["nll"] == pytest.approx(math.log(10))


def test_rows_that_are_not_finite_count_as_wrong():
    logits = torch.eye(6) * 100
    logits[0] = float("nan")
    logits[1, 1] = float("inf")
    found, rest = metrics(logits, torch.arange(6)), metrics(logits[2:], torch.arange(2, 6))
    assert found["top1"] == pytest.approx(100 * 4 / 6) and rest["top1"] == 100
    for name in ("nll", "brier", "ece", "ece_adaptive", "reliability"):
        assert found[name] == rest[name], name
    assert scores(logits, torch.arange(6))["prediction"].tolist() == [-1, -1, 2, 3, 4, 5]


def test_all_rows_not_finite():
    found = metrics(torch.full((3, 6), float("nan")), torch.arange(3))
    assert found["top1"] == found["top5"] == 0
    assert math.isnan(found["nll"]) and math.isnan(found["ece"])


def test_balanced_accuracy_equals_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = random_case(10)
    # Unequal classes, and one without images.
    labels = torch.where(labels == 3, 4, labels)
    found = scores(logits, labels)
    accuracies = class_accuracies(labels.numpy(), found["correct"], 10)
    assert accuracies[3] is None and len(accuracies) == 10
    predicted = found["prediction"].astype(int)
    recalls = sklearn.recall_score(
        labels.numpy(), predicted, labels=range(10), average=None, zero_division=0.0
    )
    found_recalls = [0.0 if one is None else one for one in accuracies]
    assert found_recalls == pytest.approx(100 * recalls)

    values = {"image": np.arange(257), "part": np.zeros(257, int), "label": labels.numpy(), **found}
    result = make_result("x", Records("x", values), 10, 10)
    with warnings.catch_warnings():
        # It warns of predictions of the class without images.
        warnings.simplefilter("ignore")
        expected = sklearn.balanced_accuracy_score(labels.numpy(), predicted)
    assert result.balanced_accuracy == pytest.approx(100 * expected)
    assert abs(result.balanced_accuracy - result.top1) > 0.1
    assert result.to_dict()["per_class"] == accuracies and result.non_finite == 0


def test_result_counts_images_with_non_finite_logits():
    logits, labels = random_case(6, 40)
    logits[[3, 7]] = float("inf")
    found = scores(logits.repeat(2, 1), labels.repeat(2))
    values = {
        "image": np.tile(np.arange(40), 2),
        "part": np.repeat(np.arange(2), 40),
        "label": labels.repeat(2).numpy(),
        **found,
    }
    result = with_intervals(make_result("noise", Records("x", values), 6, 6))
    assert result.non_finite == 2 and result.num_images == 40
    assert all(math.isfinite(bound) for bound in (*result.nll_interval, *result.brier_interval))
    assert result.nll_interval[0] < result.nll < result.nll_interval[1]
    (note,) = [line for line in notes({"noise": result}) if "non-finite" in line]
    assert note.startswith("noise: 2 of 40 images")


def test_masked_outputs_have_no_effect():
    logits, _ = random_case(10)
    columns = torch.tensor([7, 2, 5])
    labels = torch.arange(257) % 3  # places in `columns`
    masked, small = scores(logits, labels, columns=columns), scores(logits[:, columns], labels)
    for name in SCORES[1:]:
        np.testing.assert_allclose(
            masked[name], small[name], rtol=1e-12, atol=1e-15
        )  # the sum has zeros between its terms
    assert masked["prediction"].tolist() == [[7, 2, 5][int(i)] for i in small["prediction"]]


def test_several_right_outputs_count_as_one_class():
    """Labels 0 = outputs {0, 3}, 1 = {4}: against the loop over images."""
    logits, _ = random_case(6)
    accepted = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    labels = torch.arange(257) % 2
    found = scores(logits, labels, accepted=accepted)
    probabilities = torch.softmax(logits.double(), 1).numpy()
    for i in range(257):
        right = {0, 3} if labels[i] == 0 else {4}
        order = np.argsort(-probabilities[i], kind="stable")
        share = sum(probabilities[i, c] for c in right)
        assert found["correct"][i] == (order[0] in right) and found["top5"][i] == bool(
            right & set(order[:5])
        )
        assert found["nll"][i] == pytest.approx(-math.log(share), rel=1e-9)
        others = sum(probabilities[i, c] ** 2 for c in range(6) if c not in right)
        assert found["brier"][i] == pytest.approx(others + (1 - share) ** 2, rel=1e-9)


def test_images_of_no_class_are_never_right():
    logits, labels = random_case(10)
    found, known = scores(logits, torch.full_like(labels, -1)), scores(logits, labels)
    assert not found["correct"].any() and np.isnan(found["nll"]).all()
    for name in ("confidence", "energy", "entropy", "prediction"):
        np.testing.assert_array_equal(found[name], known[name])
    p = torch.softmax(logits.double(), 1)
    np.testing.assert_allclose(found["energy"], torch.logsumexp(logits.double(), 1))
    np.testing.assert_allclose(found["entropy"], -(p * p.log()).sum(1))


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
