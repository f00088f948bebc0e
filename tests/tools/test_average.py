"""`dad-fast average`: soups, interpolation, batch norm, refusals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
from PIL import Image

from dad_fast.cli import main as cli
from dad_fast.config import Config, to_toml
from dad_fast.config.schema import StudentConfig
from dad_fast.config.schema_data import DataConfig
from dad_fast.data.classes import ClassMap
from dad_fast.models.load_student import load_student
from dad_fast.models.student import build_student, load_student_weights, save_student

SIDE = 32
CLASSES = ("ant", "bee")


def make_student(path: Path, seed: int, name: str = "test_resnet", classes=CLASSES) -> Path:
    torch.manual_seed(seed)
    student = build_student(StudentConfig(name=name), len(classes), SIDE)
    student.spec["crop_pct"] = 1.0
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    listed = ClassMap(tuple((i, folder, folder) for i, folder in enumerate(classes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_student(path, student, {"dad_fast.classes": listed.to_json(), "dad_fast.method": "ce"})
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("average")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for level, name in enumerate(CLASSES):
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = random.integers(0, 128, (SIDE, SIDE, 3)) + 120 * level
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / "data" / split / name / f"{i}.png"
                )
    for seed in range(3):
        make_student(root / f"run-{seed}" / "model.safetensors", seed)
    return root


def average(*arguments: Any) -> int:
    return cli.main(["average", *map(str, arguments)])


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_student(path)[0].model.state_dict()


def test_weighted_mean_is_a_model_that_other_commands_take(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [place / f"run-{seed}" for seed in range(3)]
    out = tmp_path / "soup"
    assert average(*runs, "--weights", 1, 1, 2, "-o", out) == 0
    shown = capsys.readouterr().out
    assert "running statistics are averaged" in shown
    assert f"evaluate it with dad-fast eval {out} --data-dir DIR" in shown
    parts, found = [tensors(run) for run in runs], tensors(out)
    for key, value in found.items():
        if value.is_floating_point():
            expected = (parts[0][key] + parts[1][key] + 2 * parts[2][key]) / 4
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    record = json.loads((out / "average.json").read_text())
    assert [one["weight"] for one in record["members"]] == [0.25, 0.25, 0.5]
    assert record["batch_norm"] == "averaged"

    student, metadata = load_student(out)
    assert metadata["dad_fast.method"] == "ce"
    fresh = build_student(StudentConfig(name="test_resnet"), 2, SIDE)
    load_student_weights(fresh, out)
    pixels = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(pixels), student(pixels))

    image = place / "data" / "val" / "ant" / "0.png"
    assert cli.main(["predict", str(out), str(image), "--device", "cpu"]) == 0
    given = ["eval", str(out), "--data-dir", str(place / "data"), "--suite", "val", "-j", "0"]
    assert cli.main([*given, "--device", "cpu"]) == 0
    assert "val" in capsys.readouterr().out


def test_the_hint_names_the_data_of_the_runs(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_student(tmp_path / "run/model.safetensors", 0).parent
    data = DataConfig(data_dir=str(place / "data"))
    (run / "config.toml").write_text(to_toml(Config(data=data)), encoding="utf-8")
    out = tmp_path / "soup"
    assert average(run, place / "run-1", "-o", out) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "evaluate it" in line]
    hint = shlex.split(line.partition("evaluate it with dad-fast ")[2])
    assert cli.main([*hint, "-j", "0", "--device", "cpu"]) == 0


def test_uniform_mean_of_equal_models_is_that_model(place: Path, tmp_path: Path) -> None:
    run = place / "run-0"
    assert average(run, run, run, "-o", tmp_path / "same") == 0
    ours = tensors(run)
    for key, value in tensors(tmp_path / "same").items():
        assert torch.equal(value, ours[key]), key


def test_interpolation_ends_at_both_models(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["-j", "0", "--device", "cpu", "--suite", "val", "brightness:3", "contrast:3"]
    run, start, out = place / "run-0", place / "run-1", tmp_path / "wise"
    # The start's folder has no settings, so the data is named; batch norm is estimated on it.
    more = ["--data-dir", place / "data", "--points", 3, "--alpha", 0.25]
    assert average(run, "--interpolate", start, "-o", out, *more, *data) == 0
    shown = capsys.readouterr().out
    assert "mean of others" in shown and "estimated on 12 images" in shown
    record = json.loads((out / "average.json").read_text())
    assert [point["alpha"] for point in record["curve"]] == [0.0, 0.5, 1.0]
    assert record["in_distribution"] == "val" and record["alpha"] == 0.25
    for point in record["curve"]:
        top1 = point["top1"]
        assert point["mean"] == pytest.approx((top1["brightness:3"] + top1["contrast:3"]) / 2)
    ours, theirs, found = tensors(run), tensors(start), tensors(out)
    expected = 0.25 * ours["conv1.0.weight"] + 0.75 * theirs["conv1.0.weight"]
    torch.testing.assert_close(found["conv1.0.weight"], expected)


def test_batch_norm_is_estimated_on_the_training_split(place: Path, tmp_path: Path) -> None:
    data = ["--data-dir", place / "data", "-j", 0, "--device", "cpu", "-b", 12]
    assert average(place / "run-0", place / "run-1", "-o", tmp_path / "out", *data) == 0
    student, _ = load_student(tmp_path / "out")
    files = sorted((place / "data" / "train").rglob("*.png"))
    pixels = torch.stack(
        [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files]
    )
    norms = [name for name, m in student.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    seen = {}
    norm = student.get_submodule(norms[0])
    norm.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    with torch.no_grad():
        student(pixels)
    mean, variance = seen["x"].mean(dim=(0, 2, 3)), seen["x"].var(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


def test_models_that_do_not_fit_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = place / "run-0", tmp_path / "out"
    other = make_student(tmp_path / "vit" / "model.safetensors", 0, "test_vit")
    assert average(run, other, "-o", out) == 4
    assert "no two sets of weights of one model" in capsys.readouterr().err
    dogs = make_student(tmp_path / "dogs" / "model.safetensors", 0, classes=("ant", "dog"))
    assert average(run, dogs, "-o", out) == 4
    assert "class 1 is 'bee' and 'dog'" in capsys.readouterr().err
    assert average(run, run, "--weights", 1, "-o", out) == 2
    assert average(run, "-o", out) == 2
    assert average(run, run, "--suite", "val", "-o", out) == 2
    assert average(other, other, "--data-dir", place / "data", "-o", out) == 2
    assert not out.exists()
    (out / "kept").mkdir(parents=True)
    assert average(run, run, "-o", out, "--overwrite") == 2
    assert "holds no average" in capsys.readouterr().err
