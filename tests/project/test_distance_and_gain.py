"""Experiment of distance and gain: statistics, tables and plot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

sys.path.insert(0, str(Path(__file__).resolve().parents[1].parent / "scripts"))
import distance_and_gain as experiment
import show_distance_and_gain as shown


def test_relation_of_distance_and_gain():
    random = np.random.default_rng(0)
    distance = np.tile(np.arange(5.0), (6, 1))
    gain = (10 - distance)[:, :, None] + 0.01 * random.standard_normal((6, 5, 3))
    found = experiment.relation(distance, gain)
    assert (
        found["rho"] == pytest.approx(-1)
        and found["interval"] == [-1, -1]
        and found["p"] == pytest.approx(1 / 120)
    )
    assert found["pooled"] < -0.9 and found["by_test"] == pytest.approx([-1] * 6)
    assert experiment.relation(distance, -gain)["p"] == 1
    noise = experiment.relation(random.standard_normal((6, 5)), random.standard_normal((6, 5, 3)))
    assert noise["interval"][0] < 0 < noise["interval"][1] and noise["p"] > 0.05
    # Identical test sets are one trial, not six: p does not shrink with their number.
    order = np.array([0.0, 1, 2, 4, 3])
    assert experiment.relation(np.tile(order, (60, 1)), gain.repeat(10, 0))["p"] == pytest.approx(
        5 / 120
    )


def test_tables_are_written_into_the_document(tmp_path):
    random = np.random.default_rng(2)
    names = list(experiment.SETS)
    value = lambda x: {"value": x, "interval": [x - 1e-4, x + 1e-4]}  # noqa: E731
    of_suite = {
        suite: {
            name: {m: value(random.random() * 1e-3) for m in ("sw2_squared_corrected", "mmd2")}
            for name in names
        }
        for suite in experiment.SUITES
    }
    distances = dict.fromkeys(experiment.SPACES, of_suite)
    top1 = {
        name: {suite: list(90 + random.random(3)) for suite in experiment.SUITES}
        for name in ("none", *names)
    }
    top1["dad"]["optdigits"] = [x + 5 for x in top1["none"]["optdigits"]]
    record = {"relation": experiment.relate(distances, top1), "top1": top1, "distances": distances}
    text = shown.tables(record)
    assert (
        "| optdigits | " in text
        and "**+5.0 ± 0.0** |" in text
        and text.count("| invert:1 |") == 4
        and "| all 18 |" in text
    )
    document = tmp_path / "analyze.md"
    document.write_text(f"before\n{shown.MARKS[0]}old\n{shown.MARKS[1]}after\n")
    shown.renew(document, text)
    shown.renew(document, text)
    assert document.read_text() == f"before\n{shown.MARKS[0]}{text}{shown.MARKS[1]}after\n"
    (tmp_path / "other.md").write_text("nothing")
    with pytest.raises(SystemExit, match="are missing"):
        shown.renew(tmp_path / "other.md", text)
    pytest.importorskip("matplotlib")
    shown.plot(record, tmp_path / "a.svg")
    shown.plot(record, tmp_path / "b.svg")
    assert "less that of clean images" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_rank_correlation_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(1)
    a, b = (
        random.integers(0, 4, (20, 6)).astype(float),
        random.integers(0, 4, (20, 6)).astype(float),
    )
    for found, x, y in zip(experiment.within(a, b), a, b, strict=True):
        assert found == pytest.approx(stats.spearmanr(x, y).statistic)
    assert experiment.within(np.ones((1, 5)), np.arange(5.0)[None]) == 0
