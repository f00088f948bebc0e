"""Paired tests and agreement, saved predictions, effective robustness, against known values."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dad_fast.errors import DataError
from dad_fast.evaluation.metrics.effective_robustness import (
    effective_robustness,
    fit,
    logit,
    read_baselines,
)
from dad_fast.evaluation.metrics.image_scores import SCORES
from dad_fast.evaluation.metrics.paired_tests import agreement, compare, mcnemar
from dad_fast.evaluation.metrics.predictions import Records, load_records, save_records


def records(correct, source: str = "s", image=None, part=None, prediction=None) -> Records:
    count = len(correct)
    values = {name: np.zeros(count) for name in SCORES} | {"correct": np.asarray(correct, float)}
    values["prediction"] = np.zeros(count) if prediction is None else np.asarray(prediction, float)
    numbers = np.arange(count) if image is None else np.asarray(image)
    return Records(
        source,
        {
            "image": numbers,
            "part": np.zeros(count, int) if part is None else np.asarray(part),
            "label": numbers,
            **values,
        },
    )


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (1, 0), (5, 5), (3, 12), (0, 20), (40, 61), (900, 1000), (30000, 31000)]
)
def test_mcnemar_is_the_exact_binomial_test(a: int, b: int) -> None:
    tail = ways = 1
    for k in range(1, min(a, b) + 1):
        ways = ways * (a + b + 1 - k) // k
        tail += ways
    expected = min(1.0, 2 * Fraction(tail, 2 ** (a + b)))
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(float(expected), rel=1e-8)


def test_paired_comparison_equals_plain_resampling() -> None:
    random = np.random.default_rng(0)
    a = random.random(500) < 0.8
    b = np.where(random.random(500) < 0.1, ~a, a)  # mostly the same answers
    found = compare("val", records(a), records(b))
    assert found["top1"] == [pytest.approx(100 * a.mean()), pytest.approx(100 * b.mean())]
    assert found["difference"] == pytest.approx(100 * (a.mean() - b.mean()))
    assert (found["only_first"], found["only_second"]) == ((a & ~b).sum(), (b & ~a).sum())
    plain = [
        100 * (a[rows].mean() - b[rows].mean()) for rows in random.integers(500, size=(4000, 500))
    ]
    assert found["interval"] == pytest.approx(np.percentile(plain, (2.5, 97.5)), abs=0.25)
    # Unpaired the interval would be nearly three times as wide.
    wide = [100 * (random.choice(a, 500).mean() - random.choice(b, 500).mean()) for _ in range(500)]
    assert found["interval"][1] - found["interval"][0] < 0.6 * np.subtract(
        *np.percentile(wide, (97.5, 2.5))
    )


def test_differences_of_nll_and_brier() -> None:
    a, b = records(np.ones(4)), records(np.ones(4))
    a.values["nll"][:], b.values["nll"][:] = (1, 2, 3, 4), (0.5, 1.5, 2.5, 3.5)
    # A row that was not finite is left out.
    a.values["nll"][1] = a.values["brier"][1] = np.nan
    found = compare("val", a, b)
    assert found["nll"] == {"difference": 0.5, "interval": [0.5, 0.5]}
    assert found["brier"]["difference"] == 0 and found["non_finite"] == 1


def test_image_in_several_parts_counts_once() -> None:
    """With five equal severities, the interval is that of the images, not of five times as many."""
    random = np.random.default_rng(0)
    a, b = random.random(100) < 0.8, random.random(100) < 0.7
    image, part = np.tile(np.arange(100), 5), np.repeat(np.arange(5), 100)
    once, five = (
        compare("x", records(a), records(b)),
        compare("x", *(records(np.tile(one, 5), image=image, part=part) for one in (a, b))),
    )
    assert five["interval"] == pytest.approx(once["interval"]) and five["num_images"] == 100
    assert once["p_value"] is not None and five["p_value"] is None


def test_other_images_are_not_compared() -> None:
    ones = np.ones(4)
    for other in (
        records(ones, source="t"),
        records(ones, image=[0, 1, 2, 4]),
        records(np.ones(3)),
        records(ones, part=[0, 0, 0, 1]),
    ):
        with pytest.raises(
            DataError, match="val: the two models were not evaluated on the same images"
        ):
            compare("val", records(ones), other)


def test_agreement_compares_predicted_classes() -> None:
    a, b = (
        records([1, 0, 0, 1], prediction=[3, 1, 2, -1]),
        records([1, 0, 0, 1], prediction=[3, 1, 5, -1]),
    )
    assert agreement(a, b) == 50.0  # an answer that is no number agrees with nothing


def test_saved_predictions_are_read_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a = Records(
        "abc",
        {
            **{name: random.integers(0, 1000, 50) for name in ("image", "part", "label")},
            **{name: random.random(50) for name in SCORES},
            "prediction": random.integers(-1, 1000, 50).astype(float),
            "correct": (random.random(50) < 0.5).astype(float),
            "top5": np.ones(50),
        },
    )
    save_records(
        tmp_path / "p.safetensors", {"model": "m", "seed": 1}, {"imagenet-a": a, "fog:3": a.part(0)}
    )
    about, suites = load_records(tmp_path / "p.safetensors")
    assert (
        about["model"] == "m"
        and list(suites) == ["imagenet-a", "fog:3"]
        and suites["imagenet-a"].source == "abc"
    )
    for name, values in a.values.items():
        np.testing.assert_array_equal(suites["imagenet-a"][name], values)
        assert suites["imagenet-a"][name].dtype == values.dtype


def test_files_without_predictions_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    good = {f"s/{field}": np.zeros(3) for field in ("image", "part", "label", *SCORES)}
    about = {"dad_fast.predictions": json.dumps({"suites": {"s": "x"}})}
    for number, (arrays, metadata, message) in enumerate(
        [
            (good, {}, "no predictions of dad-fast"),
            ({**good, "s/part": np.zeros(2)}, about, "differ in shape"),
            ({"a": np.zeros(1)}, about, "no predictions of dad-fast .no 's/image'"),
            (good, {"dad_fast.predictions": "{"}, "damaged"),
            (good, {"dad_fast.predictions": '{"suites": [1]}'}, "damaged"),
            (
                good,
                {"dad_fast.predictions": json.dumps({"suites": {"\x1b[2Js": "x"}})},
                r"damaged .a suite is called \\x1b",
            ),
        ]
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(arrays, path, metadata)
        with pytest.raises(DataError, match=message) as caught:
            load_records(path)
        assert "\n" not in str(caught.value)


def test_line_of_baselines_is_least_squares() -> None:
    stats = pytest.importorskip("scipy.stats")
    pairs = [(50.0, 20.0), (60.0, 31.0), (70.0, 38.0), (80.0, 55.0), (0.0, 0.0)]
    line = fit(pairs)
    expected = stats.linregress([logit(a) for a, _ in pairs[:4]], [logit(b) for _, b in pairs[:4]])
    assert line.slope == pytest.approx(expected.slope) and line.intercept == pytest.approx(
        expected.intercept
    )
    assert line.r2 == pytest.approx(expected.rvalue**2) and line.num_baselines == 4
    assert fit(pairs[:2]) is None and fit([(50.0, 1.0), (50.0, 2.0), (50.0, 3.0)]) is None


def test_effective_robustness_is_accuracy_above_the_line() -> None:
    on_line = [{"val": a, "sketch": a} for a in (40.0, 60.0, 80.0)]
    found = effective_robustness(on_line, {"val": 70.0, "sketch": 75.0, "unknown": 3.0}, "val")
    assert set(found) == {"sketch"} and found["sketch"]["expected"] == pytest.approx(70.0)
    assert found["sketch"]["effective"] == pytest.approx(5.0) and found["sketch"]["id"] == "val"
    with pytest.raises(DataError, match="no suite other than val in it"):
        effective_robustness(on_line, {"val": 70.0, "other": 1.0}, "val")
    with pytest.raises(DataError, match="2 baselines have val and sketch, too few"):
        effective_robustness(on_line[:2], {"val": 70.0, "sketch": 75.0}, "val")


def test_baselines_from_csv_and_json(tmp_path: Path) -> None:
    table, listed = tmp_path / "b.csv", tmp_path / "b.json"
    table.write_text("model,val,sketch\nresnet50,76.1,24.1\nvit,79.9,\n")
    listed.write_text('[{"model": "resnet50", "val": 76.1, "sketch": 24.1}, {"val": 79.9}]')
    assert (
        read_baselines(table)
        == read_baselines(listed)
        == [{"val": 76.1, "sketch": 24.1}, {"val": 79.9}]
    )
    for text, message in [
        ("model,val\na,x\n", "baseline 1: val is 'x', not an accuracy"),
        ("model,val\na,760\n", "not an accuracy in percent"),
        ("", "needs a row for each"),
    ]:
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            read_baselines(table)
    listed.write_text("{")
    with pytest.raises(DataError, match="not a readable table"):
        read_baselines(listed)
    with pytest.raises(DataError, match="not a readable table"):
        read_baselines(tmp_path / "none.csv")
