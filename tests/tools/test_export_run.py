"""`dad-fast export` of runs: weights, model card, damaged folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")

from safetensors.torch import load_file

from dad_fast.cli import main as cli
from dad_fast.models.load_student import load_student
from tests.exports import export, make
from tests.tiny import SIDE, STUDENT, write_images, write_teacher, write_vqgan


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with EMA, auxiliary batch norm, channels_last, optimizations and a crop of its own."""
    root = tmp_path_factory.mktemp("trained")
    data, teacher, vqgan = (
        write_images(root / "data"),
        write_teacher(root / "t.safetensors"),
        write_vqgan(root / "q.ckpt"),
    )
    command = [
        "train",
        "--method",
        "dad",
        "--data-dir",
        data,
        "--teacher",
        teacher,
        "--discretizer",
        vqgan,
        *STUDENT,
        "-b",
        8,
        "-j0",
    ]
    more = [
        "--epochs",
        2,
        "--model-ema",
        "--model-ema-decay",
        0.5,
        "--bn",
        "aux",
        "--channels-last",
        "--crop-pct",
        1,
        "--device",
        "cpu",
    ]
    assert (
        cli.main(
            [str(part) for part in (*command, *more, "--warmup-epochs", 0, "-o", root / "run")]
        )
        == 0
    )
    return root / "run"


def test_run_is_exported_as_it_was_evaluated(trained: Path, tmp_path: Path) -> None:
    assert export(trained, "-o", tmp_path / "out") == 0
    saved = load_file(trained / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == found.keys() and all(
        torch.equal(saved[key], found[key]) for key in saved
    )
    assert not any("aux_bn" in key for key in found)
    student, metadata = load_student(tmp_path / "out")
    # The crop of the run, not that of resnet18.
    assert student.crop_pct == 1.0 and metadata["dad_fast.ema"] == "true"
    # A copy without config.toml in its folder.
    alone = shutil.copy(trained / "model.safetensors", tmp_path)
    assert load_student(alone)[0].spec == student.spec
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]["crop_pct"]
        == 1.0
    )
    text = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "discrete adversarial distillation",
        "(EMA)",
        "- Images: data, split train",
        "(trained on: nothing",
        "shorter side to 32 px",
        "| val | 24 |",
        "clean and attacked images: aux",
        "Teacher: t.safetensors",
    ):
        assert words in text, words
    assert str(trained.parent) not in text


@pytest.mark.slow
def test_a_compiled_transformer_is_exported_plain(tmp_path: Path) -> None:
    """Train with class_token_only, a compiled step and another memory format; the file is timm's."""
    data, teacher = write_images(tmp_path / "data"), write_teacher(tmp_path / "t.safetensors")
    size = "{embed_dim=24,depth=2,num_heads=2,patch_size=8}"
    command = [
        "train",
        "--method",
        "kd",
        "--data-dir",
        data,
        "--teacher",
        teacher,
        "--student",
        "vit_tiny_patch16_224",
        "-b",
        8,
        "-j0",
    ]
    more = [
        "--set",
        f"student.model_kwargs={size}",
        "--img-size",
        SIDE,
        "--torchcompile",
        "--channels-last",
        "--epochs",
        1,
        "--device",
        "cpu",
    ]
    assert (
        cli.main(
            [str(part) for part in (*command, *more, "--warmup-epochs", 0, "-o", tmp_path / "run")]
        )
        == 0
    )
    assert export(tmp_path / "run", "-o", tmp_path / "out", "--format", "timm", "torch") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert (
        type(model.blocks[-1]) is type(model.blocks[0])
        and model.state_dict().keys() == load_file(tmp_path / "run" / "model.safetensors").keys()
    )
    log = (tmp_path / "run" / "train.log").read_text()
    assert "optimizations of the student: class_token_only" in log


def test_raw_weights_are_those_of_the_optimizer(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(trained, "-o", tmp_path / "raw", "--weights", "raw") == 0
    state = load_file(trained / "checkpoints" / "latest" / "train.safetensors")
    found = load_file(tmp_path / "raw" / "model.safetensors")
    assert all(torch.equal(found[key], state[f"student.model.{key}"]) for key in found)
    assert not torch.equal(
        found["fc.weight"], load_file(trained / "model.safetensors")["fc.weight"]
    )
    assert load_student(tmp_path / "raw")[1]["dad_fast.ema"] == "false"
    assert "No results of these weights (raw)" in (tmp_path / "raw" / "README.md").read_text()
    step = (trained / "checkpoints" / "latest").resolve()
    assert export(step, "-o", tmp_path / "step", "--weights", "raw") == 0  # the checkpoint itself
    assert export(step, "-o", tmp_path / "ema", "--weights", "ema") == 0
    # The weights of a checkpoint are not the final ones.
    assert "No results" in (tmp_path / "ema" / "README.md").read_text()
    assert capsys.readouterr().err == ""


def test_missing_kind_of_weights_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "bare" / "model.safetensors")
    make(tmp_path / "plain" / "model.safetensors", ema=False)
    assert export(tmp_path / "bare", "-o", tmp_path / "x", "--weights", "raw") == 4
    assert "only checkpoints hold raw weights" in capsys.readouterr().err
    assert export(tmp_path / "plain", "-o", tmp_path / "x", "--weights", "ema") == 2
    assert "trained without EMA" in capsys.readouterr().err
    # Its only weights.
    assert export(tmp_path / "plain", "-o", tmp_path / "y", "--weights", "raw") == 0
    copy = Path(shutil.copytree((trained / "checkpoints" / "latest").resolve(), tmp_path / "step"))
    content = bytearray((copy / "train.safetensors").read_bytes())
    content[-100] ^= 1
    (copy / "train.safetensors").write_bytes(content)
    assert export(copy, "-o", tmp_path / "x", "--weights", "raw") == 4
    assert "its content has changed" in capsys.readouterr().err
    (copy / "state.json").write_text("[" * 10**5)
    assert export(copy, "-o", tmp_path / "x", "--weights", "raw") == 4
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["results.json", "run.json", "config.toml"])
@pytest.mark.parametrize("content", ["{", "[]", '{"suites": 3, "steps": "x"}', "[" * 10**5, "\x00"])
def test_a_damaged_run_folder_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in ("model.safetensors", "results.json", "run.json", "config.toml"):
        shutil.copy(trained / file, run)
    (run / name).write_text(content)
    code = export(run, "-o", tmp_path / "out")
    error = capsys.readouterr().err
    if name == "run.json" and content.startswith('{"'):
        assert code == 0  # nothing in it is needed
    else:
        assert (
            code in (2, 4)
            and error.count("\n") == 1
            and name in error
            and not (tmp_path / "out").exists()
        )
