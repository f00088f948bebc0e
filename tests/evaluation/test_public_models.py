"""timm's published results: the table, `--baselines timm`, `--like`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("timm")

from dad_fast.cli import main as cli
from dad_fast.evaluation.metrics.effective_robustness import effective_robustness, fit
from dad_fast.evaluation.public_models import as_baselines, better_models, read_run, table

SIZES = {"imagenet": 50_000, "imagenet-r": 30_000, "val": 10}


def write_results(folder: Path, parameters: int, **top1: float) -> Path:
    suites = {
        name.replace("_", "-"): {"top1": value, "num_images": SIZES[name.replace("_", "-")]}
        for name, value in top1.items()
    }
    folder.mkdir(exist_ok=True)
    record = {"num_parameters": parameters, "suites": suites}
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def test_table_has_timms_numbers() -> None:
    about, suites, models = table()
    assert "Apache-2.0" in about and len({model.name for model in models}) == 1266
    assert suites == ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch")
    (found,) = [one for one in models if one.name == "vit_base_patch16_clip_224.openai_ft_in1k"]
    assert (found.million_parameters, found.img_size) == (86.57, 224)
    assert dict(found.top1) == {
        "imagenet": 85.282,
        "imagenet-v2": 76.09,
        "imagenet-a": 47.453,
        "imagenet-r": 65.883,
        "imagenet-sketch": 50.993,
    }
    assert all(0 <= value <= 100 for model in models for value in model.top1.values())


def test_baselines_give_a_line_for_every_suite() -> None:
    ours = {"imagenet": 79.6, "imagenet-v2": 69.9, "imagenet-r": 65.1}
    found = effective_robustness(as_baselines(), ours, "imagenet")
    assert set(found) == {"imagenet-v2", "imagenet-r"}
    pairs = [(one["imagenet"], one["imagenet-v2"]) for one in as_baselines() if len(one) == 5]
    line = fit(pairs)
    assert line is not None and line.r2 > 0.95
    assert found["imagenet-v2"]["expected"] == pytest.approx(line.expected(79.6), abs=0.05)
    # DAD's ViT-B/16 is above the line on renditions.
    assert found["imagenet-r"]["effective"] > 5


def test_better_models_are_smaller_and_better_everywhere(tmp_path: Path) -> None:
    run = read_run(write_results(tmp_path / "run", 86_570_000, imagenet=85.0, imagenet_r=65.0))
    better = better_models(run)
    names = [model.name for model in better]
    assert "vit_base_patch16_clip_224.openai_ft_in1k" in names and len(set(names)) == len(names)
    for model in better:
        assert model.million_parameters <= 86.575
        assert model.top1["imagenet"] > 85 and model.top1["imagenet-r"] > 65
    means = [model.mean(["imagenet", "imagenet-r"]) for model in better]
    assert means == sorted(means, reverse=True)
    smaller = read_run(write_results(tmp_path / "run", 1_000_000, imagenet=85.0, imagenet_r=65.0))
    assert better_models(smaller) == []


def eval_like(*arguments: Any) -> int:
    return cli.main(["eval", "--like", *map(str, arguments)])


def test_like_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_results(tmp_path / "run", 25_560_000, imagenet=75.7, imagenet_r=51.6)
    assert eval_like(run, "--json", tmp_path / "like.json") == 0
    shown = capsys.readouterr().out
    assert "public models of at most 25.6 M parameters" in shown and "Source: timm" in shown
    found = json.loads((tmp_path / "like.json").read_text())
    assert "resnet50.fb_swsl_ig1b_ft_in1k" in [model["name"] for model in found["better"]]


def test_like_without_comparable_results_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_results(tmp_path / "own", 1000, val=90.0)
    assert eval_like(own) == 4
    message = capsys.readouterr().err
    assert "it has val" in message and "--suite imagenet=DIR" in message

    part = write_results(tmp_path / "part", 1000, imagenet=90.0)
    record = json.loads((part / "results.json").read_text())
    record["suites"]["imagenet"]["num_images"] = 500
    (part / "results.json").write_text(json.dumps(record))
    assert eval_like(part) == 4
    assert "imagenet: 500 of 50,000 images" in capsys.readouterr().err

    assert eval_like(tmp_path / "nothing") == 4
    (tmp_path / "bad.json").write_text("[]")
    assert eval_like(tmp_path / "bad.json") == 4
    assert "holds no results" in capsys.readouterr().err
    assert eval_like(own, "--suite", "val") == 2
