"""`dad-fast analyze` as a command: output files, spaces and errors."""

from __future__ import annotations

import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("open_clip")

from PIL import Image

from dad_fast.cli import analyze as flags
from dad_fast.cli import main as cli
from dad_fast.errors import DataError, UsageError
from dad_fast.models.load_student import load_student
from dad_fast.tools.analyze.measure import feature_space
from tests import tiny
from tests.numerics import assert_same_function


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Make a folder of images, a teacher, a VQGAN, and a run of two steps."""
    root = tmp_path_factory.mktemp("parts")
    tiny.write_images(root / "data")
    common = [
        "--data-dir",
        str(root / "data"),
        "--teacher",
        str(tiny.write_teacher(root / "teacher.safetensors")),
    ]
    common += [
        "--discretizer",
        str(tiny.write_vqgan(root / "vqgan.ckpt")),
        "-j",
        "0",
        "-b",
        "10",
        "--img-size",
        str(tiny.SIDE),
    ]
    run = root / "run"
    assert (
        cli.main(
            [
                "train",
                *common,
                *tiny.STUDENT,
                "--method",
                "dad",
                "--max-steps",
                "2",
                "--epochs",
                "8",
                "-o",
                str(run),
            ]
        )
        == 0
    )
    return root, common, run


def analyze(*arguments) -> int:
    return flags.main(
        [*map(str, arguments), "--num-images", "24", "--resamples", "20", "--projections", "8"],
        debug=False,
    )


def test_a_run_is_analyzed(parts, capsys):
    root, _, run = parts
    assert analyze(run, "--suite", "val", "contrast:3", "fog", "--no-filter") == 0
    out = run / "analysis"
    assert sorted(path.name for path in out.iterdir()) == [
        "analysis.json",
        "analysis.md",
        "sheet-dad.png",
        "sheet-dat.png",
        "sheet-random-q.png",
    ]
    record = json.loads((out / "analysis.json").read_text())
    assert list(record["sets"]) == ["clean", "q_clean", "random_q", "dat", "dad"]
    assert list(record["distances"]["tests"]) == ["val", "contrast:3", "fog"]
    assert (
        record["distances"]["size"] == 24
        and record["student"]["method"] == "dad"
        and not record["filter"]
    )
    for name, one in record["sets"].items():
        assert one["num_images"] == one["num_counted"] == 24 and one["vendi_score"] >= 1
        assert (one["codes_changed"] is None) == (name in ("clean", "q_clean"))
        assert "moved" in one or name == "clean"
    for found in record["distances"]["tests"].values():
        for one in found["sets"].values():
            assert all(
                math.isfinite(x)
                for values in one.values()
                for x in (values["value"], *values["interval"])
            )
    text = (out / "analysis.md").read_text()
    assert text in capsys.readouterr().out and "| val |" in text and "DAT" in text
    assert Image.open(out / "sheet-dat.png").width > 300
    again = root / "again"
    assert analyze(run, "--suite", "val", "contrast:3", "fog", "--no-filter", "-o", again) == 0
    assert json.loads((again / "analysis.json").read_text())["distances"] == record["distances"]


@pytest.mark.slow  # a second analysis
def test_without_a_student_there_is_no_dat(parts, tmp_path, capsys):
    _, common, run = parts
    assert analyze(*common, "--no-filter", "-o", tmp_path) == 0
    record = json.loads((tmp_path / "analysis.json").read_text())
    assert (
        list(record["sets"]) == ["clean", "q_clean", "random_q", "dad"]
        and record["student"] is None
    )
    assert (
        "DAT is left out" in capsys.readouterr().out and not (tmp_path / "sheet-dat.png").exists()
    )
    assert list(record["distances"]["tests"]) == ["val"]
    # An earlier analysis is replaced.
    assert analyze(*common, "--no-filter", "--init-from", run, "-o", tmp_path) == 0
    assert "dat" in json.loads((tmp_path / "analysis.json").read_text())["sets"]


@pytest.mark.slow  # trains and measures again; the default space is above
def test_other_spaces(parts, tmp_path):
    _, common, run = parts
    distances = {}
    for space in ("teacher", "student", "pixels"):
        assert analyze(run, "--no-filter", "--features", space, "-o", tmp_path) == 0
        record = json.loads((tmp_path / "analysis.json").read_text())
        distances[space] = record["distances"]["tests"]["val"]["sets"]["dad"]["sw2"]["value"]
        assert record["features"] == space and distances[space] > 0
        assert 1 <= record["sets"]["clean"]["vendi_score"] <= 24
    assert len(set(distances.values())) == 3
    assert "features of the student resnet18" not in (tmp_path / "analysis.md").read_text()
    with pytest.raises(UsageError, match="--features student: no student is named"):
        analyze(*common, "--features", "student", "-o", tmp_path)


@pytest.mark.slow  # trains a probe
def test_a_linear_probe_is_a_student_too(parts, tmp_path):
    _, common, _ = parts
    run = tmp_path / "probe"
    assert (
        cli.main(
            [
                "train",
                *common,
                "--method",
                "lp-clip",
                "--max-steps",
                "2",
                "--epochs",
                "8",
                "-o",
                str(run),
            ]
        )
        == 0
    )
    assert (
        analyze(
            run,
            *common[4:6],
            "--no-filter",
            "--features",
            "student",
            "--set",
            "attack.random_start=0",
        )
        == 0
    )
    record = json.loads((run / "analysis" / "analysis.json").read_text())
    assert record["student"]["method"] == "lp-clip" and "dat" in record["sets"]
    assert record["sets"]["dat"]["codes_changed"]["value"] > 0


def test_student_features_are_classifier_inputs(parts):
    _, _, run = parts
    student, _ = load_student(run)
    pixels = torch.rand(3, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        features = student.model.forward_head(
            student.model.forward_features((pixels - student.mean) / student.std), pre_logits=True
        )
        found = feature_space("student", None, student)(pixels)
        assert_same_function(found, (features / features.norm(dim=1, keepdim=True)).double())
        assert_same_function(student.model.get_classifier()(features), student(pixels))
    pixels = torch.rand(2, 3, 64, 64)
    seen = feature_space("pixels", None, None)(pixels)
    assert seen.shape == (2, 3 * 32 * 32)
    shrunk = torch.nn.functional.avg_pool2d(pixels, 2).double().flatten(1)
    assert (seen[0] - seen[1]).norm().item() == pytest.approx(
        (shrunk[0] - shrunk[1]).square().mean().sqrt().item()
    )


def test_filter_with_too_few_images_is_a_one_line_error(parts, tmp_path):
    _, common, _ = parts
    with pytest.raises(
        DataError,
        match=r"has only \d+ images to compare, 20 are needed; raise --num-images, or add --no-filter",
    ):
        analyze(*common, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(parts, tmp_path, capsys):
    root, common, run = parts
    (tmp_path / "file").write_text("x")
    (tmp_path / "several" / "dad" / "seed-0").mkdir(parents=True)
    (tmp_path / "several" / "config.toml").write_text('[variants.dad]\nmethod = "dad"\n')
    # A run without weights, and a run with truncated settings.
    for name in (
        "half",
        "torn",
    ):
        (tmp_path / name).mkdir()
    text = (run / "config.toml").read_text()
    (tmp_path / "half" / "config.toml").write_text(text)
    (tmp_path / "torn" / "config.toml").write_text(text[: text.index("[teacher]") + 5])
    out = ["-o", str(tmp_path / "out")]
    for arguments, message in (
        ([str(tmp_path / "half")], "half"),
        ([str(tmp_path / "torn")], "not valid TOML"),
        ([], "-o OUT"),
        ([str(tmp_path)], "no run (there is no config.toml in it)"),
        (
            [str(tmp_path / "several")],
            "holds several runs; name one of them, such as "
            + str(tmp_path / "several" / "dad" / "seed-0"),
        ),
        ([str(tmp_path / "nothing"), *out], "no such file"),
        (["--preset", "demoo", *out], "did you mean demo?"),
        (out, "--data-dir"),
        (["--data-dir", str(root / "data"), *out], "nothing names a teacher: add --teacher"),
        ([*common[:4], *out], "nothing names a discretizer: add --discretizer"),
        ([*common, "--num-images", "5", *out], "--num-images 5"),
        ([*common, "--features", "techer", *out], "did you mean teacher?"),
        ([*common, "--resamples", "two", *out], "--resamples two"),
        ([*common, "--suites", "val", *out], "did you mean --suite"),
        ([*common, "--suite", "vall", *out], "--suite vall"),
        ([*common, "--suite", "fog:7", *out], "--suite fog:7"),
        ([*common, "-o", str(tmp_path / "file")], "is a file; name a folder"),
        ([*common, "--init-from", str(tmp_path), *out], str(tmp_path)),
        (
            [str(run), "--img-size", "3", "--no-filter", *out],
            "choose an --img-size that is a multiple of 4",
        ),
    ):
        with pytest.raises((UsageError, DataError)) as caught:
            flags.main(list(arguments), debug=False)
        assert message in str(caught.value) and "\n" not in str(caught.value), (
            arguments,
            str(caught.value),
        )
    assert not (tmp_path / "out").exists()


def test_a_student_of_other_classes_is_refused(parts, tmp_path):
    _root, _common, run = parts
    other = tiny.write_images(tmp_path / "other", classes=("ant", "bee", "dog"))
    with pytest.raises(DataError, match="its classes are not those of"):
        analyze(run, "--data-dir", other, "-o", tmp_path / "out")


def test_help_fits_a_screen():
    lines = flags.help_text().splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100


@pytest.mark.slow
def test_on_the_embedded_digits_an_attack_changes_more_codes_than_noise(tmp_path):
    command = [
        "--preset",
        "demo",
        "--num-images",
        "100",
        "--resamples",
        "20",
        "--suite",
        "optdigits",
        "-o",
        str(tmp_path),
    ]
    assert flags.main(command, debug=False) == 0
    sets = json.loads((tmp_path / "analysis.json").read_text())["sets"]
    assert (
        0.5 < sets["random_q"]["codes_changed"]["value"] < sets["dad"]["codes_changed"]["value"] < 1
    )
    assert sets["dad"]["teacher_top1"] < 90 < sets["q_clean"]["teacher_top1"]
