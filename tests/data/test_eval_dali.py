"""Evaluation decoded by DALI: order of images, fail-over to PIL, and the loader in results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from dad_fast.cli import main as cli
from dad_fast.config.schema import StudentConfig
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.dali import evaluation as dali_evaluation
from dad_fast.data.loaders.dali.evaluation import DaliEvalLoader
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.registry import open_source
from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.models.student import build_student, save_student

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures of several shapes, as JPEGs in colour and grey, and PNGs."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, (width, height) in enumerate(
        [(90, 60), (61, 97), (80, 80), (200, 45), (33, 32), (64, 128)] * 2
    ):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        path = root / "val" / "ab"[number % 2] / f"{number}.{'png' if number % 5 == 4 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image.convert("L") if number == 3 else image).save(path, quality=95)
    return root


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_close_to_pil(photos: Path, interpolation: str) -> None:
    source = open_source(str(photos), "val")
    view = (View(32, 0.875, interpolation), 5, 0)
    loader = DaliEvalLoader(source, *view, device=CPU)
    for ours, theirs in zip(EvalLoader(source, *view), loader, strict=True):
        assert torch.equal(ours.labels, theirs.labels) and torch.equal(ours.samples, theirs.samples)
        off = (ours.images.int() - theirs.images.int()).abs().float().mean(dim=(1, 2, 3))
        png = torch.tensor([source.keys[int(i)].endswith(".png") for i in ours.samples])
        assert (off[png] == 0).all()  # PIL made them
        assert 0 < off.max() < 1.0, [
            (source.keys[int(i)], round(float(x), 2))
            for i, x in zip(ours.samples, off, strict=True)
        ]
    assert loader.failed_over == 0


def test_pil_makes_a_batch_that_dali_cannot(photos: Path) -> None:
    """Every image still comes once, in order, when batches fail in the middle of a pass."""
    source = open_source(str(photos), "val")
    loader = DaliEvalLoader(source, View(32, 0.875, "bilinear"), 4, 0, device=CPU)
    original, calls = loader._images, []

    def fails_once(pipeline, planned):
        calls.append(1)
        if len(calls) == 2:  # no image any more, behind the checks of the workers
            planned = planned._replace(files=torch.zeros_like(planned.files))
        return original(pipeline, planned)

    loader._images = fails_once
    batches = list(loader)
    assert loader.failed_over == 1 and len(calls) == 3
    assert torch.equal(torch.cat([batch.samples for batch in batches]), torch.arange(12))
    assert torch.equal(
        batches[1].images, list(EvalLoader(source, View(32, 0.875, "bilinear"), 4, 0))[1].images
    )


def test_repeated_dali_failures_end_the_evaluation(photos: Path) -> None:
    loader = DaliEvalLoader(
        open_source(str(photos), "val"), View(32, 0.875, "bilinear"), 1, 0, device=CPU
    )

    def fails(pipeline, planned):
        raise RuntimeError("out of order")

    loader._images = fails
    with pytest.raises(
        EnvironmentProblem,
        match=r"8 batches in a row that PIL can read \(out of order\); use --loader pil",
    ):
        list(loader)


def test_filters_that_dali_lacks_are_refused(photos: Path) -> None:
    with pytest.raises(
        UsageError,
        match="--interpolation box: DALI resizes with nearest, bilinear, bicubic, lanczos",
    ):
        DaliEvalLoader(open_source(str(photos), "val"), View(32, 0.875, "box"), 4, 0, device=CPU)


def test_results_record_the_loader(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    classes = open_source(str(photos), "val").classes
    save_student(
        tmp_path / "m.safetensors",
        build_student(StudentConfig(name="test_resnet"), 2, 32),
        {"dad_fast.classes": classes.to_json()},
    )
    found = {}
    for loader in ("torchvision", "dali"):
        arguments = [
            str(tmp_path / "m.safetensors"),
            "--data-dir",
            str(photos),
            "--loader",
            loader,
            "-j",
            "1",
            "--device",
            "cpu",
        ]
        assert cli.main(["eval", *arguments, "--json", str(tmp_path / "o.json")]) == 0
        record = json.loads((tmp_path / "o.json").read_text())
        found[record["decoder"]] = record["checkpoint"]["suites"]["val"]
    assert (
        found["DALI"]["protocol"] == found["PIL"]["protocol"] + "; decoded by DALI"
        and "decoded by DALI" in capsys.readouterr().out
    )
    assert found["DALI"]["num_images"] == found["PIL"]["num_images"] == 12
    assert found["DALI"]["nll"] == pytest.approx(found["PIL"]["nll"], abs=0.02)


def test_a_pipeline_that_cannot_be_built_ends_the_evaluation(photos: Path, monkeypatch) -> None:
    def cannot(**options):
        raise RuntimeError("no such driver")

    monkeypatch.setattr(dali_evaluation, "_view", cannot)
    loader = DaliEvalLoader(
        open_source(str(photos), "val"), View(32, 0.875, "bilinear"), 4, 0, device=CPU
    )
    with pytest.raises(EnvironmentProblem, match=r"--loader dali: .*no such driver.*--loader pil"):
        list(loader)
