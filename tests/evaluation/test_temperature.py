"""`--calibrate`: the fitted temperature, the model's file, and every command that uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
from PIL import Image
from scipy.optimize import minimize_scalar

from dad_fast.cli import main as cli
from dad_fast.config.schema import StudentConfig
from dad_fast.data.classes import ClassMap
from dad_fast.evaluation.metrics.temperature import fit_temperature, mean_nll
from dad_fast.models.load_student import load_student
from dad_fast.models.student import build_student, load_student_weights, save_student
from dad_fast.models.weights.files import read_state_dict, write_safetensors

SIDE, CLASSES = 32, ("ant", "bee", "cat")


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_temperature_is_the_minimum_of_the_nll(scale: float) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(5, size=400)
    logits = random.normal(size=(400, 5))
    logits[np.arange(400), labels] += 1
    logits *= scale
    found = fit_temperature(logits.astype(np.float32), labels)
    reference = minimize_scalar(
        lambda log_t: mean_nll(logits.astype(np.float32), labels, float(np.exp(log_t))),
        bounds=(-4, 4),
        method="bounded",
        options={"xatol": 1e-12},
    )
    assert found == pytest.approx(np.exp(reference.x), rel=1e-6)
    for other in (0.99 * found, 1.01 * found):
        assert mean_nll(logits, labels, other) > mean_nll(logits, labels, found)


def test_logits_without_a_minimum_are_refused() -> None:
    labels = np.arange(3)
    with pytest.raises(ValueError, match="right on every image"):
        fit_temperature(np.eye(3), labels)
    with pytest.raises(ValueError, match="no better than chance"):
        fit_temperature(-np.eye(3), labels)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run's file whose student is right on most images, and overconfident; its data."""
    random = np.random.default_rng(0)
    for split in ("val", "test"):
        for number, name in enumerate(CLASSES):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = random.integers(0, 100, (SIDE, SIDE, 3))
                # Every eighth image looks like another class.
                pixels[..., (number + (i == 0)) % 3] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(
                    tmp_path / "data" / split / name / f"{i}.png"
                )
    torch.manual_seed(0)
    student = build_student(StudentConfig(name="test_vit"), 3, SIDE)
    student.spec["crop_pct"] = 1.0
    fit_head(student, tmp_path / "data" / "val")
    classes = ClassMap(tuple((i, name, name) for i, name in enumerate(CLASSES)))
    (tmp_path / "run").mkdir()
    save_student(
        tmp_path / "run" / "model.safetensors",
        student,
        {"dad_fast.classes": classes.to_json(), "dad_fast.method": "ce"},
    )
    return tmp_path


def images_of(folder: Path) -> torch.Tensor:
    files = sorted(folder.rglob("*.png"))
    return torch.stack(
        [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files]
    )


@torch.no_grad()
def fit_head(student: torch.nn.Module, folder: Path) -> None:
    """Set the classifier by least squares on the features, with large logits."""
    student.eval()
    pixels = images_of(folder)
    model = student.model
    features = model.forward_head(
        model.forward_features((pixels - student.mean) / student.std), pre_logits=True
    )
    # The colour, which is the label of seven images of eight.
    target = torch.nn.functional.one_hot(pixels.mean(dim=(2, 3)).argmax(1), 3).float()
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1)
    solution = torch.linalg.lstsq(inputs, target - 1 / 3).solution
    model.head.weight.copy_(12 * solution[:-1].T)
    model.head.bias.copy_(12 * solution[-1])


def calibrate(place: Path, *more: Any) -> int:
    given = ["eval", place / "run", "--data-dir", place / "data", "--device", "cpu", "-j", "0"]
    return cli.main([*map(str, given), *map(str, more)])


def test_calibration_is_stored_and_used(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, pixels = place / "run" / "model.safetensors", images_of(place / "data" / "val")
    before, _ = load_student(file)
    labels = np.repeat(np.arange(3), 8)
    with torch.no_grad():
        logits = before(pixels)
    out = place / "out.json"
    assert calibrate(place, "--calibrate", "val", "--suite", "val", "test", "--json", out) == 0
    shown = capsys.readouterr().out
    assert "is stored with the model" in shown and "(fitted on it)" in shown

    record = json.loads(out.read_text())
    facts = record["calibration"]
    expected = fit_temperature(logits.numpy(), labels)
    assert facts["temperature"] == pytest.approx(expected, rel=1e-4) and expected > 1.5
    assert facts["nll"] == pytest.approx(
        [mean_nll(logits.numpy(), labels), mean_nll(logits.numpy(), labels, expected)], rel=1e-4
    )
    assert record["checkpoint"]["suites"]["val"]["nll"] == pytest.approx(facts["nll"][1], rel=1e-4)
    assert record["checkpoint"]["temperature"] == facts["temperature"]
    for suite in ("val", "test"):
        old, new = facts["ece"][suite]
        assert new < old

    after, _ = load_student(file)
    with torch.no_grad():
        torch.testing.assert_close(after(pixels), logits / facts["temperature"])
    # The weights stay, and initial weights take them without the temperature.
    fresh = build_student(StudentConfig(name="test_vit"), 3, SIDE)
    load_student_weights(fresh, file)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(pixels), logits)

    image = place / "data" / "val" / "ant" / "1.png"
    given = ["predict", str(place / "run"), str(image), "--json", "--top", "1", "--device", "cpu"]
    assert cli.main(given) == 0
    captured = capsys.readouterr()
    assert "confidences are calibrated: temperature" in captured.err
    confidence = json.loads(captured.out)["predictions"][0]["confidence"]
    assert confidence == pytest.approx(after(pixels[1:2]).softmax(1).max().item(), abs=1e-3)

    assert cli.main(["export", str(place / "run"), "-o", str(place / "export")]) == 0
    assert "calibrated: temperature" in capsys.readouterr().out
    exported, _ = load_student(place / "export")
    assert exported.calibration is None
    with torch.no_grad():
        torch.testing.assert_close(exported(pixels), after(pixels), rtol=1e-4, atol=1e-4)
    assert "Calibration: temperature" in (place / "export" / "README.md").read_text()


def test_calibration_needs_a_model_and_a_plain_split(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "run" / "model.safetensors"
    content = file.read_bytes()
    assert calibrate(place, "--calibrate", "contrast:3") == 2
    assert "needs clean images" in capsys.readouterr().err
    assert calibrate(place, "--calibrate", "val", "--nproc", "2") == 2
    assert cli.main(["eval", "timm:test_vit", "--calibrate", "val", "--suite", "val"]) == 2
    assert file.read_bytes() == content


def test_damaged_temperature_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "run" / "model.safetensors"
    tensors, metadata = read_state_dict(file)
    bad = {**metadata, "dad_fast.temperature": '{"temperature": 0, "split": "", "num_images": 1}'}
    write_safetensors(file, tensors, bad)
    assert calibrate(place, "--suite", "val") == 4
    assert "dad_fast.temperature is damaged (temperature is 0)" in capsys.readouterr().err
