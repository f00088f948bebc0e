"""Missing files and unknown names: a one-line error with the fix, before indexing data."""

import shutil

import pytest

from dad_fast.cli.main import main
from dad_fast.data.sources import folder as folder_module
from tests.tiny import STUDENT, write_images, write_teacher, write_vqgan


@pytest.fixture
def folder(tmp_path, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("the data set was indexed first")

    monkeypatch.setattr(folder_module, "build_index", never)
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", per_class=2)
    return tmp_path


def refused(capsys, *arguments, code):
    assert (
        main(["train", "--data-dir", "data", "-o", "run", *STUDENT, *map(str, arguments)]) == code
    )
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return line


def test_missing_weights_file_is_a_one_line_error(folder, capsys):
    teacher, vqgan = write_teacher(folder / "clip.safetensors"), write_vqgan(folder / "vqgan.ckpt")
    line = refused(
        capsys, "--teacher", "open_clip:ViT-B-32@clip.pt", "--discretizer", vqgan, code=4
    )
    assert "--teacher clip.pt: no such file; check the path" in line
    line = refused(capsys, "--teacher", "clop.safetensors", "--discretizer", vqgan, code=4)
    assert "--teacher clop.safetensors: no such file" in line
    assert "--discretizer vqgn.ckpt: no such file" in refused(
        capsys, "--teacher", teacher, "--discretizer", "vqgn.ckpt", code=4
    )
    assert "--student-weights w.pth: no such file" in refused(
        capsys, "--method", "ce", "--student-weights", "w.pth", code=4
    )
    assert "--init-from runs/gone: no such file" in refused(
        capsys, "--method", "ce", "--init-from", "runs/gone", code=4
    )


def test_missing_teacher_and_unknown_student_are_one_line_errors(folder, capsys):
    assert "--method dad needs a teacher" in refused(capsys, code=2)
    assert "timm has no such model; did you mean" in refused(
        capsys, "--method", "ce", "--student", "resnet5", code=2
    )


def test_a_distance_that_needs_more_images_is_a_one_line_error(folder, capsys):
    models = "--teacher", write_teacher(folder / "clip.safetensors"), "--discretizer", "jpeg:60"
    line = refused(capsys, *models, "--distance", "dist", "--batch-size", "1", code=2)
    assert "--distance dist compares the images of a batch and needs 2" in line
    line = refused(capsys, *models, "--distance", "dits", code=2)
    assert "--distance dits: no such distance; did you mean dist?" in line


def test_splits_of_different_classes_are_a_one_line_error(folder, capsys):
    (folder / "data/val/bee").rename(folder / "data/val/beee")
    line = refused(capsys, "--method", "ce", code=4)
    assert (
        "only train has the class bee, only val has the class beee; fix the folders or give "
        "--class-map" in line
    )
    shutil.rmtree(folder / "data/val")
    assert "data has no folder 'val'; it has train" in refused(capsys, "--method", "ce", code=4)


def test_a_single_class_is_a_one_line_error_that_names_the_level_below(folder, capsys):
    """Archives often unpack to train/train/CLASS."""
    for split in ("train", "val"):
        (folder / "data" / split).rename(folder / "data" / f"_{split}")
        (folder / "data" / split).mkdir()
        (folder / "data" / f"_{split}").rename(folder / "data" / split / "all")
    line = refused(capsys, "--method", "ce", code=4)
    assert "one class, all; a classifier needs two" in line
    assert "its folders (ant, bee" in line and "--train-split train/all" in line
    splits = ("--train-split", "train/all", "--val-split", "val/all")
    assert "indexed first" in refused(capsys, "--method", "ce", *splits, code=1)


def test_missing_checkpoint_is_a_one_line_error(folder, capsys):
    assert (
        main(
            [
                "train",
                "--data-dir",
                "embedded:digits",
                "--method",
                "ce",
                *STUDENT,
                "-o",
                "run",
                "--resume",
                "run/checkpoints",
            ]
        )
        == 4
    )
    assert (
        "--resume run/checkpoints: no such file or folder; name a run's folder RUN or "
        "RUN/checkpoints/step-N" in capsys.readouterr().err
    )


@pytest.mark.parametrize("bn", ["joint", "split"])
def test_a_batch_norm_that_sees_one_value_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, bn
):
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", per_class=2)
    arguments = ("--method", "ce", "--mixup", "0", "--bn", bn, "-j", "0")
    line = refused(capsys, *arguments, "-b", "1", code=2)
    assert "cannot train on 1 images a step" in line and "set --batch-size to 2 or more" in line
    assert not (tmp_path / "run").exists()
    data = ["train", "--data-dir", "data", "-o", "run", *STUDENT]
    assert main([*data, *arguments, "-b", "2", "--max-steps", "1"]) == 0


def test_resume_with_fewer_steps_changes_nothing(tmp_path, capsys):
    arguments = [
        "train",
        "--preset",
        "demo",
        "--method",
        "ce",
        "--suite",
        "optdigits",
        "-j",
        "0",
        "-o",
        str(tmp_path / "run"),
    ]
    assert main([*arguments, "--max-steps", "2"]) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run'}: model.safetensors" in said
    before = (tmp_path / "run" / "results.json").read_bytes()
    assert main([*arguments, "--max-steps", "1", "--resume", "auto"]) == 0
    said = capsys.readouterr().err
    assert "finished already" in said and "steps 2 to 1" not in said
    assert (tmp_path / "run" / "results.json").read_bytes() == before
