"""`dad-fast export` errors: one line, and nothing is left behind or overwritten."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")
np = pytest.importorskip("numpy")

from dad_fast.errors import DadFastError
from dad_fast.models.student import Student, save_student
from dad_fast.tools.export import graph as export_graph
from dad_fast.tools.export.check import check_pixels, largest_difference, reference
from tests.exports import export, make
from tests.tiny import SIDE


def test_a_wrong_file_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "m" / "model.safetensors")
    monkeypatch.setattr("dad_fast.tools.export.timm_folder.preprocessing", _wrong_mean)
    assert export(tmp_path / "m", "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert (
        "timm local-dir gives other logits than the student" in error and "nothing is kept" in error
    )
    assert os.listdir(tmp_path) == ["m"]


def _wrong_mean(student: Student) -> dict[str, Any]:
    return {
        "input_size": (3, SIDE, SIDE),
        "mean": (0.4, 0.4, 0.4),
        "std": tuple(student.spec["std"]),
    }


def test_differences_are_found(tmp_path: Path) -> None:
    student = make(tmp_path / "model.safetensors")
    pairs = reference(student)
    assert [len(pixels) for pixels, _ in pairs] == [1, 5] and all(
        p.min() >= 0 and p.max() <= 1 for p in check_pixels(SIDE)
    )
    assert largest_difference(student, pairs, "x") == 0
    assert 0 < largest_difference(lambda pixels: student(pixels) * (1 + 5e-5), pairs, "x") <= 1e-4
    for wrong in (
        lambda x: student(x) * 1.001,
        lambda x: student(x) * math.nan,
        lambda x: student(x)[:, :2],
        lambda x: student(x.flip(1)),
    ):
        with pytest.raises(DadFastError, match="nothing is kept"):
            largest_difference(wrong, pairs, "x")
    with torch.no_grad():
        student.model.fc.bias.fill_(math.inf)
    with pytest.raises(DadFastError, match="not finite"):
        reference(student)


def test_folders_are_replaced_only_when_asked_and_only_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "m" / "model.safetensors")
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "m", "-o", tmp_path / "empty") == 0
    assert export(tmp_path / "m", "-o", tmp_path / "empty") == 2
    assert "add --overwrite" in capsys.readouterr().err
    (tmp_path / "empty" / "mine.txt").write_text("left from me")
    make(tmp_path / "m" / "model.safetensors", seed=1)
    before = (tmp_path / "empty" / "model.safetensors").read_bytes()
    assert export(tmp_path / "m", "-o", tmp_path / "empty", "--overwrite") == 0
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() != before and not (
        tmp_path / "empty" / "mine.txt"
    ).exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "file").touch()
    for name, words in (
        ("precious", "holds no export"),
        ("link", "is a link"),
        ("file", "is a file"),
        ("m", "holds no export"),
    ):
        assert export(tmp_path / "m", "-o", tmp_path / name, "--overwrite") == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years"
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "link", "m", "precious"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "nothing to export"),
        (["x"], 2, "name the new folder"),
        (["{m}", "-o", "{m}/o", "--format", "onx"], 2, "did you mean onnx?"),
        (["none", "-o", "{m}/o"], 4, "no such checkpoint"),
        (["{m}/wrong.safetensors", "-o", "{m}/o"], 4, "not a student"),
        (["{m}/classes.safetensors", "-o", "{m}/o"], 4, "class list"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    student = make(tmp_path / "model.safetensors")
    save_student(tmp_path / "classes.safetensors", student, {})
    (tmp_path / "wrong.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert export(*(argument.format(m=tmp_path) for argument in arguments)) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "o").exists()


@pytest.mark.parametrize("missing", export_graph.PACKAGES)
def test_onnx_without_its_packages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    make(tmp_path / "model.safetensors")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == missing else found(name, *more),
    )
    assert export(tmp_path, "-o", tmp_path / "o", "--format", "onnx") == 3
    error = capsys.readouterr().err
    assert (
        missing in error
        and "pip install 'dad-fast[export]'" in error
        and not (tmp_path / "o").exists()
    )
