"""Tests of the demo's committed weights and of the script that makes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for package in ("open_clip", "safetensors", "mlxtend", "sklearn"):
    pytest.importorskip(package)

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.sources.embedded import EmbeddedSource
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.weights.files import asset, read_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1].parent / "scripts"))
import make_demo_weights as script

CPU = torch.device("cpu")


def test_embedded_weights_are_under_8_mb():
    assert (
        sum(asset(f"digits-{kind}.safetensors").stat().st_size for kind in ("clip", "vqgan"))
        < 8_000_000
    )


def test_teacher_zero_shot_accuracy_on_unseen_digits():
    classes = EmbeddedSource("val").classes
    teacher = load_teacher(TeacherConfig(name="embedded:digits"), classes, PrecisionConfig(), CPU)
    for split in ("val", "optdigits"):
        assert script.accuracy(teacher, *script.load(split)) > 98.0
    assert "3,500 digits of MNIST's training split" in teacher.provenance


def test_zero_shot_head_follows_the_class_names():
    # Another order of the classes is another order of the outputs: the head is made from prompts,
    # not stored.
    classes = EmbeddedSource("val").classes
    turned = type(classes)(
        tuple((i, folder, name) for i, (_, folder, name) in enumerate(reversed(list(classes))))
    )
    pixels = script.load("val")[0][:50]
    straight, reverse = (
        load_teacher(TeacherConfig(name="embedded:digits"), each, PrecisionConfig(), CPU)(pixels)
        for each in (classes, turned)
    )
    torch.testing.assert_close(reverse, straight.flip(1))


def test_discretizer_keeps_digits_readable():
    discretizer = load_discretizer("embedded:digits", PrecisionConfig(), CPU)
    pixels, _ = script.load("val")
    images, codes = discretizer(pixels)
    assert codes.shape == (len(pixels), 7, 7)
    assert (images - pixels).square().mean().sqrt() < 0.12
    assert len(codes.unique()) > 128  # the codebook did not collapse
    assert discretizer.provenance


def test_training_images_are_not_in_evaluation_splits():
    seen = {key for split in script.SPLITS.values() for key in EmbeddedSource(split).keys}
    evaluated = {
        key for split in ("val", "test", "optdigits") for key in EmbeddedSource(split).keys
    }
    assert not seen & evaluated


def test_sights_are_in_range_and_reproducible():
    pixels = script.load("val")[0][:64]
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(script.corrupt(script.move(pixels)))
    assert torch.equal(*draws)
    assert draws[0].min() >= 0 and draws[0].max() <= 1


@pytest.mark.slow  # trains teacher and VQGAN twice
def test_same_seed_writes_the_same_fp16_files(tmp_path):
    pixels, labels = script.load("train")
    sets = [(pixels[:256], labels[:256])]
    for name in ("a", "b"):
        torch.manual_seed(0)
        script.make_teacher(
            tmp_path / f"{name}-clip.safetensors", sets, script.move, epochs=1, seen="256 digits"
        )
        script.make_discretizer(
            tmp_path / f"{name}-vqgan.safetensors", sets, script.move, epochs=1, seen="256 digits"
        )
    for kind in ("clip", "vqgan"):
        assert (tmp_path / f"a-{kind}.safetensors").read_bytes() == (
            tmp_path / f"b-{kind}.safetensors"
        ).read_bytes()
        state, _ = read_state_dict(tmp_path / f"a-{kind}.safetensors")
        assert {tensor.dtype for tensor in state.values()} <= {torch.float16, torch.int64}


@pytest.mark.parametrize("see", ["mnist,imagenet", "corruptions"])
def test_unknown_or_empty_sight_is_refused(see, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_demo_weights.py", "--see", see])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert "--see" in capsys.readouterr().err
