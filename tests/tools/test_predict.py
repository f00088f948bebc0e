"""`dad-fast predict`: same classes for all formats; unreadable images are named; names are escaped."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("safetensors")
np = pytest.importorskip("numpy")
from PIL import Image

from dad_fast.cli import main as cli
from dad_fast.cli import predict as flags
from dad_fast.config import to_toml
from dad_fast.data.augment.execute import eval_transform
from dad_fast.methods.settings import resolve
from dad_fast.models.load_student import load_student
from dad_fast.tools.predict import find_images
from tests.exports import NAMES, export, make, needs_onnx
from tests.tiny import SIDE

SHOWN = ("ant", "bee <b>|`x`", "c\\x1b[31md")  # as the terminal gets them


def predict(*arguments: Any) -> int:
    return cli.main(["predict", *map(str, arguments), "--device", "cpu"])


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (40, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        path
    )
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a student, its export, and images: two in a folder, one below, one hidden, and other
    files.
    """
    root = tmp_path_factory.mktemp("predict")
    make(root / "run" / "model.safetensors")
    onnx = [] if importlib.util.find_spec("onnxscript") is None else ["onnx"]
    assert export(root / "run", "-o", root / "export", "--format", "timm", *onnx) == 0
    for number, name in enumerate(
        ("a.png", "b.JPG", "below/c.webp", ".hidden.png", ".cache/d.png")
    ):
        photo(root / "photos" / name, number, (40 + number, 50))
    (root / "photos" / "notes.txt").write_text("no image")
    return root


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_confidences_are_the_students(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(place / "run", place / "photos", "--json") == 0
    found = rows(capsys.readouterr().out)
    assert [Path(row["image"]).name for row in found] == ["a.png", "b.JPG", "c.webp"]
    student, _ = load_student(place / "run")
    for row in found:
        levels = eval_transform(
            Image.open(row["image"]).convert("RGB"),
            *student.view,
        )
        with torch.no_grad():
            shares = student(
                torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255
            ).softmax(1)[0]
        order = shares.argsort(descending=True).tolist()
        assert [one["class"] for one in row["predictions"]] == order
        assert [one["confidence"] for one in row["predictions"]] == pytest.approx(
            shares[order].tolist(), abs=1e-5
        )
        assert [one["name"] for one in row["predictions"]] == [NAMES[number] for number in order]
        assert [one["folder"] for one in row["predictions"]] == [
            f"folder{number}" for number in order
        ]


@pytest.mark.parametrize(
    "model",
    ["run/model.safetensors", "export", pytest.param("export/model.onnx", marks=needs_onnx)],
)
def test_all_formats_predict_the_same(
    place: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert predict(place / "run", place / "photos", "-b", 2) == 0
    expected = capsys.readouterr().out
    assert predict(place / model, place / "photos") == 0
    assert capsys.readouterr().out == expected
    assert len(expected.splitlines()) == 3 and expected.count(" %") == 9


@needs_onnx
def test_a_folder_with_onnx_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.onnx", "export.json"):
        shutil.copy(place / "export" / name, tmp_path)
    assert predict(tmp_path, place / "photos" / "a.png", "--top", "1") == 0
    assert capsys.readouterr().out.count(" %") == 1


def test_crop_of_the_run_is_used(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "model.safetensors")
    sets = ["data.data_dir=x", "student.name=resnet18", "method=ce", "augment.crop_pct=0.5"]
    (tmp_path / "config.toml").write_text(to_toml(resolve(None, None, sets)))
    image = place / "photos" / "a.png"
    assert predict(tmp_path, image, "--json") == predict(place / "run", image, "--json") == 0
    ours, other = rows(capsys.readouterr().out)
    assert ours["predictions"] != other["predictions"]
    # The crop is stored with the model.
    assert export(tmp_path, "-o", tmp_path / "o") == 0
    capsys.readouterr()
    assert predict(tmp_path / "o", image, "--json") == 0
    assert rows(capsys.readouterr().out) == [ours]


def test_unreadable_images_are_named_and_the_others_predicted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, short = tmp_path / "bad\x1b[2J\n.png", tmp_path / "short.jpg"
    bad.write_text("no image")
    short.write_bytes(photo(tmp_path / "whole.jpg").read_bytes()[:300])
    good = place / "photos" / "a.png"
    assert predict(place / "run", bad, good, tmp_path / "none.png", short, "-b", 3) == 4
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1 and str(good) in output.out
    assert len(output.err.splitlines()) == 4 and "\x1b" not in output.err
    for words in (
        "bad\\x1b[2J\\n.png: not an image",
        "none.png: no such file",
        "short.jpg: ",
        "3 of 4 images could not be read",
    ):
        assert words in output.err, words
    assert predict(place / "run", bad, good, "--json") == 4
    first, second = rows(capsys.readouterr().out)
    assert first == {"image": str(bad), "error": "not an image"} and len(second["predictions"]) == 3


def test_names_are_escaped_on_a_terminal(
    place: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    name = os.fsencode(tmp_path) + b"/\x1b]0;x\x07\xff\xc2\x9b.png"
    os.link(photo(tmp_path / "a.png"), name)
    assert predict(place / "run", os.fsdecode(name)) == 0
    assert predict(place / "run", os.fsdecode(name), "--json") == 0
    text, line = capsysbinary.readouterr().out.splitlines()
    assert text.decode().isprintable() and SHOWN[2] in text.decode()
    assert line.isascii() and line.decode().isprintable()
    assert os.fsencode(json.loads(line)["image"]) == name


def test_a_bomb_is_not_decoded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        (b"IHDR", (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"),
        (b"IDAT", zlib.compress(b"\0" * 10**6)),
        (b"IEND", b""),
    ]
    chunks = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in parts
    ]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert predict(place / "run", tmp_path / "bomb.png") == 4
    assert "more pixels than the safe limit" in capsys.readouterr().err


def test_folders_are_searched_without_following_links(tmp_path: Path) -> None:
    photo(tmp_path / "b" / "2.png")
    photo(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    names = [name for name, _ in find_images([str(tmp_path), "x.png"])]
    assert [os.path.relpath(name, tmp_path) for name in names[:2]] == [
        "a/1.png",
        "b/2.png",
    ] and names[2:] == ["x.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name a model and images"),
        (["{run}"], 2, "name images"),
        (["{run}", "x.png", "--top", "0"], 2, "--top 0"),
        (["{run}", "x.png", "-b", "many"], 2, "--batch-size many"),
        (["nowhere", "x.png"], 4, "no such checkpoint"),
        (["{run}/..", "x.png"], 4, "no model.safetensors"),
        (["{run}", "{empty}"], 4, "no images in this folder"),
        (["{run}", "x.png", "--jsn"], 2, "did you mean --json?"),
        (["{empty}/x.onnx", "x.png"], 4, "no such checkpoint"),
    ],
)
def test_errors_are_one_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    assert (
        predict(*(argument.format(run=place / "run", empty=tmp_path) for argument in arguments))
        == code
    )
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@needs_onnx
def test_hostile_onnx_files(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    sound = onnx.load(str(place / "export" / "model.onnx"))
    image = place / "photos" / "a.png"

    def refused(model: Any, *words: str) -> None:
        content = model if isinstance(model, bytes) else model.SerializeToString()
        (tmp_path / "m.onnx").write_bytes(content)
        assert predict(tmp_path / "m.onnx", image) == 4
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1 and "m.onnx" in error and all(word in error for word in words)
        ), error

    def described(**entries: Any) -> Any:
        model = onnx.ModelProto()
        model.CopyFrom(sound)
        for prop in model.metadata_props:
            if prop.key in entries:
                prop.value = entries[prop.key]
            elif prop.key.removeprefix("dad_fast.") in entries:
                prop.value = entries[prop.key.removeprefix("dad_fast.")]
        return model

    refused(b"", "not an ONNX model")
    refused(b"\x00" * 1000, "not an ONNX model")
    refused(sound.SerializeToString()[:5000], "not an ONNX model")
    refused(described(view="{"), "damaged")
    refused(described(view="[" * 10**5), "damaged")
    refused(
        described(
            view=json.dumps(
                {
                    "name": "x",
                    "num_classes": 3,
                    "img_size": 10**9,
                    "crop_pct": 1,
                    "interpolation": "x",
                }
            )
        ),
        "img_size",
    )
    refused(
        described(
            view=json.dumps(
                {
                    "name": "x",
                    "num_classes": 4,
                    "img_size": SIDE,
                    "crop_pct": 1,
                    "interpolation": "x",
                }
            )
        ),
        "inputs",
    )
    refused(described(classes="[[0]]"), "class list")
    bare = onnx.ModelProto()
    bare.CopyFrom(sound)
    del bare.metadata_props[:]
    refused(bare, "not exported by dad-fast")
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 4 * 3 * SIDE * SIDE)
    outside = onnx.ModelProto()
    outside.CopyFrom(sound)
    tensor = outside.graph.initializer[0]
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {
        "location": "../../../../../../../etc/passwd",
        "offset": "0",
        "length": str(size),
    }.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    refused(outside, "not an ONNX model")


@needs_onnx
def test_onnx_refuses_other_devices(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["predict", str(place / "export" / "model.onnx"), "x.png", "--device", "meta"])
        == 2
    )
    assert "runs on the CPU" in capsys.readouterr().err


def test_help_examples_parse() -> None:
    lines = [
        line.strip() for line in flags.HELP.splitlines() if line.startswith("  dad-fast predict ")
    ]
    assert len(lines) == 3
    for line in lines:
        assert flags.parse(shlex.split(line.partition(" > ")[0])[2:]).images


def test_a_published_model_predicts_classes_of_a_class_map(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    weights, table = tmp_path / "w.pth", tmp_path / "classes.csv"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), weights)
    table.write_text("id,folder,name\n0,a,ant\n1,b,bee\n2,c,cow\n")
    image = place / "photos" / "a.png"
    name = f"timm:test_resnet@{weights}"
    assert predict(name, image, "--class-map", table, "--json", "--top", "3") == 0
    (row,) = rows(capsys.readouterr().out)
    assert {one["name"] for one in row["predictions"]} == {"ant", "bee", "cow"}

    # Without a class map they are ImageNet's 1000.
    assert predict(name, image) == 4
    error = capsys.readouterr().err
    assert "3 outputs, the data 1000 classes" in error and "open_clip" in error


def test_a_class_map_of_other_classes_than_the_runs_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "classes.csv"
    table.write_text("id,folder,name\n0,a,ant\n1,b,bee\n2,c,cow\n")
    assert predict(place / "run", place / "photos", "--class-map", table) == 4
    assert "leave --class-map out" in capsys.readouterr().err


def test_pillows_warnings_are_not_shown(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Image.open(place / "photos" / "a.png") as image:
        image.quantize(8).save(tmp_path / "palette.png", transparency=bytes(range(8)))
    monkeypatch.setattr("sys.warnoptions", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "palette.png") as again:
            again.convert("RGB")
        assert len(caught) == 1  # as Pillow itself does
        assert predict(place / "run", tmp_path / "palette.png") == 0
        assert len(caught) == 1
