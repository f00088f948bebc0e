"""`dad-fast export --push`, and models of the hub by timm:hf-hub:USER/REPO."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("safetensors")

from huggingface_hub import ModelCard

from dad_fast.cli import main as cli
from dad_fast.config import Config, to_toml
from dad_fast.config.schema import PrecisionConfig, StudentConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, EnvironmentProblem
from dad_fast.models.load_student import load_student
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.student import build_student, save_student
from dad_fast.models.teacher import Teacher
from tests.exports import NAMES, export, make
from tests.hub import FOREIGN, TOKEN, Hub, serve_hub, use_hub
from tests.numerics import assert_same_function
from tests.tiny import SIDE, write_images

NOBODY_LISTENS = "http://127.0.0.1:9"
FOLDERS = tuple(f"folder{i}" for i in range(len(NAMES)))
SUITES = {
    "val": {"num_images": 24, "top1": 87.5, "top5": None, "ece": 4.0, "nll": 0.5},
    "imagenet-a": {"num_images": 9, "top1": 33.3, "top5": 66.6, "ece": 25.0, "nll": 2.25},
}


def make_run(folder: Path) -> Path:
    """Write the files of a finished run that an export reads."""
    make(folder / "model.safetensors")
    (folder / "config.toml").write_text(to_toml(Config()))
    results = {"steps": 6, "epochs": 2.0, "seconds": 1.5, "suites": SUITES}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("hub") / "run")


@pytest.fixture(scope="module")
def pushed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path, Path]]:
    """Push an export to me/robust; yield the hub, the export, and the hub's cache."""
    root = tmp_path_factory.mktemp("pushed")
    with serve_hub() as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(patch, hub.url, root / "cache", TOKEN)
        assert export(run, "-o", root / "out", "--push", "me/robust") == 0
        yield hub, root / "out", root / "cache"


def test_push_uploads_every_file_and_the_metrics(pushed: tuple[Hub, Path, Path]) -> None:
    hub, folder, _ = pushed
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repositories == {"me/robust": files}
    assert {"README.md", "config.json", "export.json", "model.safetensors"} == set(files)
    assert sum(request.endswith("/commit/main") for request in hub.requests) == 1

    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "timm" and card.data.model_name == "robust"
    assert "timm.create_model('hf-hub:me/robust', pretrained=True)" in card.text
    found = {
        (result.dataset_type, result.metric_name): result.metric_value
        for result in card.data.eval_results
    }
    assert found == {
        ("val", "top-1 accuracy"): 0.875,
        ("val", "expected calibration error"): 0.04,
        ("val", "negative log-likelihood"): 0.5,
        ("imagenet-a", "top-1 accuracy"): 0.333,
        ("imagenet-a", "top-5 accuracy"): 0.666,
        ("imagenet-a", "expected calibration error"): 0.25,
        ("imagenet-a", "negative log-likelihood"): 2.25,
    }


def test_a_pushed_export_is_student_and_teacher(
    pushed: tuple[Hub, Path, Path], tmp_path: Path
) -> None:
    _, folder, _ = pushed
    expected = load_student(folder)[0].eval()
    pixels = torch.rand(3, 3, SIDE, SIDE)
    with torch.no_grad():
        logits = expected(pixels)
    name = "timm:hf-hub:me/robust"
    student = build_student(StudentConfig(name=name, pretrained=True), len(NAMES))
    assert student.name == "resnet18" and student.image_size == SIDE
    assert_same_function(student.eval()(pixels), logits)
    save_student(tmp_path / "model.safetensors", student, {})
    assert_same_function(load_student(tmp_path)[0](pixels), logits)

    def teacher(*folders: str) -> Teacher:
        classes = ClassMap(tuple((i, folder, folder) for i, folder in enumerate(folders)))
        cfg = TeacherConfig(name=name)
        return load_teacher(cfg, classes, PrecisionConfig(), torch.device("cpu"))

    assert_same_function(teacher(*FOLDERS)(pixels), logits)
    with pytest.raises(DataError, match="its class 0 is 'folder0', the data's is 'folder2'"):
        teacher(*reversed(FOLDERS))
    with pytest.raises(EnvironmentProblem, match="timm:hf-hub:me/none: not available"):
        load_teacher(
            TeacherConfig(name="timm:hf-hub:me/none"),
            ClassMap(((0, "a", "a"),)),
            PrecisionConfig(),
            torch.device("cpu"),
        )


def test_predict_and_eval_take_a_pushed_export(
    pushed: tuple[Hub, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predict reads the classes from the repository; eval compares them with the data's."""
    _, folder, _ = pushed
    images = write_images(tmp_path / "data", FOLDERS, per_class=1) / "val"
    capsys.readouterr()
    found = []
    for model in ("timm:hf-hub:me/robust", folder):
        assert cli.main(["predict", str(model), str(images), "--json", "--device", "cpu"]) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(found[0]) == len(FOLDERS)
    for ours, theirs in zip(*found, strict=True):
        for one, other in zip(ours["predictions"], theirs["predictions"], strict=True):
            assert one.pop("confidence") == pytest.approx(other.pop("confidence"), rel=1e-4)
            assert one == other

    command = ["eval", "timm:hf-hub:me/robust@main", "--suite", str(images), "--device", "cpu"]
    assert cli.main([*command, "-j0", "--json", str(tmp_path / "eval.json")]) == 0
    assert "val" in (tmp_path / "eval.json").read_text()


def test_without_a_login_nothing_is_uploaded(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serve_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        assert export(run, "-o", tmp_path / "out", "--push", "me/robust") == 0
        assert hub.requests == []
        output = capsys.readouterr().out
        for words in (
            f"nothing was uploaded: no login. To {hub.url}/me/robust would go",
            "model-index:",
            "top-1 accuracy",
            "hf auth login",
        ):
            assert words in output, words
        for path in (tmp_path / "out").iterdir():
            assert f"  {path.name:<20} {path.stat().st_size:>13,} bytes\n" in output


@pytest.mark.parametrize(
    ("repository", "url", "token", "code", "words"),
    [
        ("robust", NOBODY_LISTENS, "", 2, "write USER/REPO"),
        ("me/robust/x", NOBODY_LISTENS, "", 2, "--push me/robust/x: "),
        ("me/a b", NOBODY_LISTENS, "", 2, "--push me/a b: "),
        ("me/robust", NOBODY_LISTENS, TOKEN, 3, f"{NOBODY_LISTENS} cannot be reached"),
        ("me/robust", "", "hf_wrong", 3, "hf auth login"),
    ],
)
def test_errors_come_before_anything_is_written(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    repository: str,
    url: str,
    token: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for another try"))
    with serve_hub() as hub:
        use_hub(monkeypatch, url or hub.url, tmp_path / "cache", token)
        assert export(run, "-o", tmp_path / "out", "--push", repository) == code
        assert not any(request.startswith("POST") for request in hub.requests)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_results_or_permission_is_not_pushed(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "bare" / "model.safetensors")
    with serve_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache", TOKEN)
        assert export(tmp_path / "bare", "-o", tmp_path / "out", "--push", "me/robust") == 2
        assert "no results of" in capsys.readouterr().err and not (tmp_path / "out").exists()
        assert hub.requests == []

        # The export is kept if the hub refuses it.
        assert export(run, "-o", tmp_path / "out", "--push", f"{FOREIGN}robust") == 3
        error = capsys.readouterr().err
        assert "not uploaded (403" in error and f"{tmp_path / 'out'} is written" in error
        assert (tmp_path / "out" / "export.json").is_file() and hub.repositories == {}
        assert export(run, "-o", tmp_path / "out", "--push", "me/robust") == 2
        assert "add --overwrite" in capsys.readouterr().err
