"""Measures of linear probes against sklearn and by hand, and the checks command on real runs."""

from __future__ import annotations

import json
import math

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
from dad_fast.tools.probe.measures import (
    class_means,
    few_labels,
    nearest_mean,
    silhouette,
    uncertainty,
)


def clusters(num=90, classes=4, width=5, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, num)
    return random.normal(0, 1, (num, width)) + random.normal(0, 1.5, (classes, width))[
        labels
    ], labels


@pytest.mark.parametrize("chunk", [7, 1024])
def test_silhouette_is_sklearns(chunk, monkeypatch):
    metrics = pytest.importorskip("sklearn.metrics")
    monkeypatch.setattr("dad_fast.tools.probe.measures.CHUNK", chunk)
    features, labels = clusters()
    labels[3] = 17  # alone in its class, and class numbers with gaps
    found = silhouette(torch.from_numpy(features), torch.from_numpy(labels))
    assert found == pytest.approx(metrics.silhouette_score(features, labels), abs=1e-12)


def test_silhouette_of_points_on_a_line_by_hand():
    features, labels = torch.tensor([[0.0], [1.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1])
    scores = [(6 - 1) / 6, (5 - 1) / 5, (4.5 - 2) / 4.5, (6.5 - 2) / 6.5]
    assert silhouette(features, labels) == pytest.approx(sum(scores) / 4)
    assert silhouette(torch.ones(4, 2), labels) == 0.0
    with pytest.raises(ValueError, match="two classes"):
        silhouette(features, torch.zeros(4, dtype=torch.int64))


def test_nearest_mean_is_sklearns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    (features, labels), (others, _) = clusters(), clusters(seed=1)
    means = class_means(torch.from_numpy(features), torch.from_numpy(labels), 4)
    expected = neighbors.NearestCentroid().fit(features, labels).predict(others)
    assert nearest_mean(torch.from_numpy(others), means).tolist() == expected.tolist()


def test_class_without_samples_is_never_nearest():
    means = class_means(torch.zeros(2, 3), torch.tensor([0, 2]), 3)
    # In a tie the lowest class wins.
    assert means[1].isnan().all() and nearest_mean(torch.randn(5, 3), means).unique().tolist() == [
        0
    ]


def test_mutual_information_is_sklearns():
    """Mutual information between the probe, drawn uniformly, and its output."""
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    counts = random.multinomial(1000, random.dirichlet(np.ones(4)), size=(3, 6))  # [M, N, C]
    found = uncertainty(torch.from_numpy(counts / 1000).log())
    for i in range(6):
        expected = metrics.mutual_info_score(None, None, contingency=counts[:, i])
        assert found.epistemic[i].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(found.total, found.aleatoric + found.epistemic)


def test_uncertainty_extremes():
    # Two probes, each sure of another class.
    sure = torch.tensor([[[0.0, -torch.inf]], [[-torch.inf, 0.0]]])
    total, aleatoric, epistemic = (tensor.item() for tensor in uncertainty(sure))
    assert (total, aleatoric, epistemic) == (
        pytest.approx(math.log(2)),
        0.0,
        pytest.approx(math.log(2)),
    )
    agreed = torch.tensor([0.2, 0.8], dtype=torch.float64).log().expand(4, 1, 2)
    assert uncertainty(agreed).epistemic.item() == pytest.approx(0.0, abs=1e-15)


def test_few_labels_from_zeros_are_sklearns_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(num=40)
    strength = 0.03
    expected = linear_model.LogisticRegression(
        C=1 / (strength * 40), tol=1e-10, max_iter=10_000
    ).fit(features, labels)
    weight, bias = few_labels(
        torch.from_numpy(features),
        torch.from_numpy(labels),
        torch.zeros(4, 5),
        torch.zeros(4),
        strength,
    )
    probabilities = (torch.from_numpy(features) @ weight.T + bias).softmax(dim=1)
    np.testing.assert_allclose(probabilities.numpy(), expected.predict_proba(features), atol=2e-4)


def test_strong_penalty_keeps_the_start():
    features, labels = clusters()
    start = torch.randn(4, 5)
    weight, _ = few_labels(
        torch.from_numpy(features), torch.from_numpy(labels), start, torch.zeros(4), 1e6
    )
    torch.testing.assert_close(weight, start.double(), rtol=0, atol=1e-5)


# --- of runs ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forked_workers):
    for package in ("timm", "open_clip", "mlxtend", "sklearn"):
        pytest.importorskip(package)
    from dad_fast.cli.main import main

    root = tmp_path_factory.mktemp("runs")
    given = [
        "--preset",
        "lp-clip-demo",
        "--set",
        "variants={}",
        "--set",
        "lp_clip.views=0",
        "--max-steps",
        "2",
        "--suite",
        "val",
    ]
    assert main(["train", *given, "--seeds", "2", "-o", str(root / "lp")]) == 0
    return [str(root / f"lp/lp-clip/seed-{seed}") for seed in (0, 1)]


def test_the_checks_of_an_ensemble(runs, tmp_path, capsys):
    from dad_fast.tools.probe.checks import main

    out = tmp_path / "checks.json"
    assert (
        main(
            [
                *runs,
                "--suite",
                "val",
                "contrast:5",
                "--labels",
                "1,3",
                "--draws",
                "2",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    record = json.loads(out.read_text())
    val, contrast = record["suites"]["val"], record["suites"]["contrast:5"]
    trained = [
        json.loads(open(f"{run}/results.json").read())["suites"]["val"]["top1"] for run in runs
    ]
    assert (
        val["probe"] == pytest.approx(trained)
        and val["num_images"] == 500
        and val["zero_shot"] > 95
    )
    assert val["nearest_class_mean"] > 95 and 0.3 < val["silhouette"] < 1
    assert {
        k: {start: len(values) for start, values in found.items()}
        for k, found in val["few_labels"].items()
    } == {
        "1": {"probe": 2, "zeros": 2},
        "3": {"probe": 2, "zeros": 2},
    }
    parts = val["uncertainty"]
    assert parts["total"] == pytest.approx(parts["aleatoric"] + parts["epistemic"])
    assert 50 < contrast["uncertainty"]["auroc"]["total"] <= 100
    assert "AUROC by epistemic" in capsys.readouterr().out


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    import shutil

    from dad_fast.tools.probe.checks import main

    alone = shutil.copy(f"{runs[0]}/model.safetensors", tmp_path / "model.safetensors")
    mistakes = [
        (2, "--labels", [runs[0], "--labels", "1,x"]),
        (2, "--json", [runs[0], "--json", str(tmp_path / "no/where.json")]),
        (2, "config.toml", [str(alone)]),
        (4, "no such checkpoint", [str(tmp_path / "nowhere")]),
        (2, "contrast", [runs[0], "--suite", "contrats"]),
    ]
    for code, word, arguments in mistakes:
        assert main(arguments) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and word in lines[0], lines
