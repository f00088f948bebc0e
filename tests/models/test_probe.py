"""Tests of linear probes: training, evaluation, file format, one-line errors."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
import tiny
from probes import arguments, config, teacher_of, trained

from dad_fast.cli.main import main
from dad_fast.errors import DataError
from dad_fast.models.load_student import load_student
from dad_fast.models.probe import Probe
from tests.numerics import assert_same_function

pytestmark = pytest.mark.usefixtures("cache")


def test_train_evaluate_and_predict_with_a_probe(parts, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(parts, out, "--lp-threshold", "0.3", "--lp-weight", "none")) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["method"] == "lp-clip"
    assert record["student"].startswith("linear probe on ")
    assert record["teacher"]["suites"]["val"]
    assert main(["eval", str(out), "--suite", "val", "--json", str(tmp_path / "eval.json")]) == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())["checkpoint"]["suites"]["val"]
    assert evaluated["top1"] == record["suites"]["val"]["top1"]
    assert evaluated["nll"] == pytest.approx(record["suites"]["val"]["nll"], rel=1e-4)
    assert (
        main(
            arguments(
                parts, out, "--lp-threshold", "0.3", "--lp-weight", "none", "--resume", "auto"
            )
        )
        == 0
    )
    assert "finished already" in capsys.readouterr().err
    again = arguments(
        parts,
        tmp_path / "more",
        "--init-from",
        out,
        "--lp-labels",
        "true",
        "--lr",
        "1e-12",
        "--min-lr",
        "0",
    )
    assert main(again) == 0
    first, second = (load_student(tmp_path / name)[0].model.weight for name in ("run", "more"))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_load_student_returns_encoder_and_head_as_one_model(parts, tmp_path):
    trainer = trained(config(parts), tmp_path / "run")
    probe, metadata = load_student(tmp_path / "run")
    pixels = torch.rand(4, 3, 32, 32)
    assert isinstance(probe, Probe)
    assert not probe.training
    assert metadata["dad_fast.method"] == "lp-clip"
    assert_same_function(probe(pixels), trainer.evaluated.eval()(pixels))
    assert (probe.num_classes, probe.image_size, probe.crop_pct, probe.interpolation) == (
        3,
        32,
        1.0,
        "bicubic",
    )
    # No encoder in it
    assert (tmp_path / "run/checkpoints/latest/model.safetensors").stat().st_size < 4096
    # And it can teach
    teacher = teacher_of(parts, head=tmp_path / "run/checkpoints/latest/model.safetensors")
    assert_same_function(teacher(pixels), probe(pixels))


def test_a_moved_teacher_file_is_found_next_to_the_probe(parts, tmp_path):
    moved = tmp_path / "teacher.safetensors"
    moved.write_bytes((parts / "teacher.safetensors").read_bytes())
    trained(config(parts, f"teacher.name={moved}"), tmp_path / "run")
    file = tmp_path / "run/checkpoints/latest/model.safetensors"
    moved.rename(file.resolve().parent / "teacher.safetensors")
    load_student(file)
    (file.resolve().parent / "teacher.safetensors").unlink()
    with pytest.raises(DataError, match="teacher.safetensors"):
        load_student(file)


def test_another_encoder_is_refused(parts, tmp_path, capsys):
    moved = tmp_path / "teacher.safetensors"
    moved.write_bytes((parts / "teacher.safetensors").read_bytes())
    assert main([*arguments(parts, tmp_path / "run"), "--teacher", str(moved)]) == 0
    tiny.write_teacher(moved, seed=1)
    capsys.readouterr()
    refused = [
        ["eval", str(tmp_path / "run"), "--suite", "val"],
        arguments(parts, tmp_path / "new", "--teacher", moved, "--init-from", tmp_path / "run"),
        arguments(
            parts,
            tmp_path / "new",
            "--teacher",
            moved,
            "--teacher-head",
            tmp_path / "run/model.safetensors",
        ),
    ]
    for command in refused:
        assert main(command) == 4
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("dad-fast")
        ]
        assert len(lines) == 1 and "another encoder" in lines[0]


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        '{"num_features": 60000}',
        *(
            pytest.param(text, marks=pytest.mark.slow)
            for text in ("[]", "{}", '{"teacher": 3}', '{"num_features": 16.0}')
        ),
    ],
)
def test_damaged_metadata_is_a_one_line_error(parts, tmp_path, damage):
    from dad_fast.models.weights.files import read_state_dict, write_safetensors

    trainer = trained(config(parts), tmp_path / "run")
    trainer.write_model(tmp_path / "model.safetensors")
    state, metadata = read_state_dict(tmp_path / "model.safetensors")
    if damage.endswith("}") and "num_features" in damage:
        damage = json.dumps(json.loads(metadata["dad_fast.probe"]) | json.loads(damage))
    write_safetensors(tmp_path / "bad.safetensors", state, {**metadata, "dad_fast.probe": damage})
    with pytest.raises(DataError, match="damaged|its weight is not of"):
        load_student(tmp_path / "bad.safetensors")


MISTAKES = {
    "mixed images": ("--mixup", ["--mixup", "0.8"]),
    "a store": ("--store", ["--store", "somewhere"]),
    "no teacher": ("--teacher", ["--teacher", ""]),
    "true labels with a threshold": (
        "--lp-threshold",
        ["--lp-labels", "true", "--lp-threshold", "0.5"],
    ),
    "a threshold that is none": ("between 0 and 1", ["--lp-threshold", "1.5"]),
    "two starts": ("--init-from", ["--lp-init", "zero-shot", "--init-from", "somewhere"]),
    "kept features and DALI": ("--loader dali", ["--lp-views", "2", "--loader", "dali"]),
    "more features than memory": ("--lp-views", ["--lp-views", "10000000000"]),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_usage_errors_are_one_line_and_write_nothing(parts, tmp_path, capsys, what):
    word, more = MISTAKES[what]
    assert main(arguments(parts, tmp_path / "out", *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dad-fast")]
    assert len(lines) == 1 and word in lines[0] and not (tmp_path / "out").exists()


def test_other_methods_refuse_a_probe_as_initial_weights(parts, tmp_path, capsys):
    """The weights of a probe do not fit a timm model."""
    trained(config(parts), tmp_path / "run")
    given = arguments(
        parts,
        tmp_path / "kd",
        "--method",
        "kd",
        *tiny.STUDENT,
        "--init-from",
        tmp_path / "run/checkpoints/latest",
    )
    assert main(given) == 4
    assert "another architecture" in capsys.readouterr().err


@pytest.mark.slow  # three trainings; heads of timm encoders are in test_heads.py
def test_probe_on_a_timm_teacher(parts, tmp_path, capsys):
    given = arguments(parts, tmp_path / "ce", "--method", "ce", "--teacher", "", *tiny.STUDENT)
    assert main(given) == 0
    teacher = f"timm:resnet18@{tmp_path / 'ce/model.safetensors'}"
    assert main(arguments(parts, tmp_path / "run", "--teacher", teacher, "--lp-views", "2")) == 0
    probe, _ = load_student(tmp_path / "run")
    assert isinstance(probe, Probe)
    assert probe.model.weight.shape == (3, 8)
    assert not probe.spec["unit_features"]
    assert main(["eval", str(tmp_path / "run"), "--suite", "val"]) == 0
    run = arguments(parts, tmp_path / "by-run", "--teacher", tmp_path / "ce", "--lp-views", "2")
    assert main(run) == 0
    by_run, _ = load_student(tmp_path / "by-run")
    assert torch.equal(by_run.model.weight, probe.model.weight)
    capsys.readouterr()
    assert (
        main(arguments(parts, tmp_path / "zs", "--teacher", teacher, "--lp-init", "zero-shot")) == 2
    )
    assert "--lp-init" in capsys.readouterr().err
    assert (
        main(
            [
                *arguments(
                    parts, tmp_path / "ce", "--method", "ce", "--teacher", "", *tiny.STUDENT
                ),
                "--overwrite",
                "--seed",
                "7",
            ]
        )
        == 0
    )
    with pytest.raises(DataError, match="another encoder"):
        load_student(tmp_path / "run")
