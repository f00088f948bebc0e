"""A newcomer's hour: a folder of photographs, no GPU and no network, to a model in use."""

from __future__ import annotations

import json
import shutil

import pytest

for package in ("torch", "timm", "open_clip"):
    pytest.importorskip(package)

from dad_fast.cli.main import main
from tests.tiny import STUDENT, write_images, write_teacher


@pytest.fixture
def photos(tmp_path, monkeypatch, cache):
    """Folder with 5 classes of 40 JPEGs in train/ alone, and a teacher's file."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", ("ant", "bee", "cat", "dog", "elk"), per_class=8)
    shutil.rmtree(tmp_path / "photos/val")
    for number in range(1, 5):
        for image in sorted((tmp_path / "photos/train").glob("*/?.jpg")):
            shutil.copy(image, image.with_stem(f"{image.stem}-{number}"))
    shutil.copy(image, tmp_path / "photos/train/stray.jpg")
    write_teacher(tmp_path / "clip.safetensors")
    return tmp_path


def test_photographs_become_an_evaluated_exported_model(photos, capsys):
    """README's commands for own data without a GPU, with a smaller student and a few steps."""
    train = ["train", "--preset", "finetune", "--data-dir", "photos", "--discretizer", "jpeg:75"]
    offline = ["--teacher", "clip.safetensors", *STUDENT, "--no-pretrained", "--workers", "0"]
    offline += ["--epochs", "10", "--stores"]
    assert main([*train, *offline, "--max-steps", "3", "-o", "run"]) == 0
    log = capsys.readouterr().err
    assert "180 of its 200 images, of 5 classes" in log and "held out for validation" in log
    assert "10 epochs, warm-up 1," in log and "0 to 3 of 8 images, 22 an epoch" in log
    # The data set is opened several times.
    assert log.count("1 images lie in photos/train itself and are not read") == 1
    record = json.loads((photos / "run/run.json").read_text())["data"]
    assert "20 of its 200 images" in record["val"]["images"]
    config = (photos / "run/config.toml").read_text()
    assert "\nbatch_size = 8 " in config and "\nwarmup_epochs = 1.0 " in config

    assert main(["eval", "run", "--suite", "val", "contrast:3", "--json", "eval.json"]) == 0
    suites = json.loads((photos / "eval.json").read_text())["checkpoint"]["suites"]
    assert [one["num_images"] for one in suites.values()] == [20, 20]
    assert main(["export", "run", "-o", "mine"]) == 0
    capsys.readouterr()
    assert main(["predict", "mine", "photos/train/ant/1.jpg", "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith("photos/train/ant/1.jpg: ")

    # The same command resumes with the same numbers and the same images.
    assert main([*train, *offline, "--max-steps", "4", "-o", "run", "--resume", "auto"]) == 0
