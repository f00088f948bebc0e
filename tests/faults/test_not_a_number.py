"""Non-finite outputs of a teacher, a VQGAN or a store: no step, one line, exit code 1 or 4."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from safetensors.torch import load_file, save_file
from tiny import STUDENT, write_parts

from dad_fast.cli.main import main
from dad_fast.models.load_student import load_student


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = write_parts(tmp_path_factory.mktemp("inputs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAD_FAST_CACHE", str(root / "cache"))
        yield root


def train(inputs: Path, out: Path, *more: str) -> int:
    arguments = [
        "train",
        "--data-dir",
        str(inputs / "data"),
        "--teacher",
        str(inputs / "teacher.safetensors"),
        "--discretizer",
        str(inputs / "vqgan.ckpt"),
        *STUDENT,
        *shlex.split("-b 8 -j 0 --epochs 2 --warmup-epochs 0 --set checkpoint.every_steps=1"),
        *shlex.split("--device cpu -o"),
        str(out),
    ]
    return main([*arguments, *more])


def poison(source: Path, target: Path, contains: str) -> None:
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    # Of a run's file; the checksum would find the change.
    metadata.pop("dad_fast.sha256", None)
    state = load_file(source)
    key = next(key for key in state if contains in key)
    state[key].view(-1)[0] = float("nan")
    save_file(state, target, metadata)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


@pytest.mark.parametrize("method", ["kd", "dad"])
def test_non_finite_teacher_stops_the_run(
    inputs: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(inputs / "teacher.safetensors", tmp_path / "bad.safetensors", "visual.conv1")
    teacher = ["--teacher", str(tmp_path / "bad.safetensors")]
    assert train(inputs, tmp_path / "run", "--method", method, *teacher) in (1, 4)
    line = one_line(capsys)
    assert "not a number" in line and "the teacher's outputs on" in line, line
    assert "--lr" not in line
    for model in (tmp_path / "run").glob("checkpoints/*/model.safetensors"):
        student, _ = load_student(model)
        assert all(torch.isfinite(p).all() for p in student.parameters())


def test_non_finite_student_weights_are_named(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(inputs, tmp_path / "run", "--method", "ce", "--max-steps", "1") == 0
    poison(tmp_path / "run" / "model.safetensors", tmp_path / "bad.safetensors", "fc.weight")
    start = ["--method", "ce", "--init-from", str(tmp_path / "bad.safetensors")]
    assert train(inputs, tmp_path / "again", *start) == 1
    line = one_line(capsys)
    assert "the student's model.fc.weight is not finite" in line and "--lr" not in line


def test_learning_rate_that_diverges_stops_the_run(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(inputs, tmp_path / "run", "--method", "ce", "--lr", "1e35") == 1
    assert "lower --lr" in one_line(capsys)
    student, _ = load_student(tmp_path / "run" / "checkpoints" / "latest" / "model.safetensors")
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_non_finite_vqgan_codes_are_reported(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Non-finite latents get code 0, which the run reports."""
    weights = torch.load(inputs / "vqgan.ckpt", weights_only=True)
    weights["state_dict"]["encoder.conv_in.weight"].view(-1)[0] = float("nan")
    torch.save(weights, tmp_path / "bad.ckpt")
    code = train(
        inputs,
        tmp_path / "run",
        "--method",
        "dad",
        "--discretizer",
        str(tmp_path / "bad.ckpt"),
        "--set",
        "log_every=1",
    )
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr and "not finite and got code 0" in stderr and code == 0, stderr


def test_store_of_a_non_finite_teacher_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(inputs / "teacher.safetensors", tmp_path / "bad.safetensors", "visual.conv1")
    code = main(
        [
            "precompute",
            "--data-dir",
            str(inputs / "data"),
            "--teacher",
            str(tmp_path / "bad.safetensors"),
            *shlex.split("--img-size 32 --discretizer"),
            str(inputs / "vqgan.ckpt"),
            *shlex.split("-b 8 -j 0 --device cpu -o"),
            str(tmp_path / "store"),
        ]
    )
    assert code in (1, 4)
    assert "the teacher's outputs on ant/0.jpg are not finite" in one_line(capsys)
