"""The examples of CONTRIBUTING.md, as a package of somebody else: installed with entry points, and trained with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("mlxtend")
from tests import warm
from tests.processes import HANG

ROOT = Path(__file__).parents[2]
ENTRY_POINTS = """\
[dad_fast.discretizers]
posterize = my_package.posterize:load
[dad_fast.methods]
kd-mse = my_package.kd_mse:KD_MSE
[dad_fast.sources]
stripes = my_package.stripes:open_stripes
[dad_fast.suites]
dim-stripes = my_package.dim_stripes:open_dim
[dad_fast.sinks]
csv = my_package.csv_sink:CsvSink
"""
TINY = (
    "--set",
    "student.model_kwargs.layers=[1,1,1,1]",
    "--set",
    "student.model_kwargs.channels=[8,8,16,16]",
)


def blocks() -> dict[str, str]:
    """File -> text of CONTRIBUTING's examples, which begin with the file's name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```python\n# (my_package/\w+\.py)\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    for name, text in {"my_package/__init__.py": "", **blocks()}.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)
    information = site / "my_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


def dad_fast(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The current folder is on sys.path.
    return warm.run([sys.executable, "-m", "dad_fast", *arguments], timeout=HANG, cwd=package)


def test_examples_are_short() -> None:
    found = blocks()
    assert len(found) == 5
    assert all(len(text.splitlines()) < 40 for text in found.values())


def test_a_package_adds_a_source_a_method_a_suite_and_a_sink(package: Path, tmp_path: Path) -> None:
    """A student learns stripes, which the package defines, from a teacher, by its loss."""
    run = tmp_path / "run"
    teacher = tmp_path / "teacher"
    common = ("--data-dir", "stripes:64", "--student", "resnet18", *TINY, "--img-size", "32")
    common += ("-b", "16", "--workers", "0", "--warmup-epochs", "0", "--epochs", "2")
    common += ("--color-jitter", "0", "--device", "cpu")
    first = dad_fast(package, "train", "--method", "ce", *common, "-o", str(teacher))
    assert first.returncode == 0, first.stderr
    name = f"timm:resnet18@{teacher / 'model.safetensors'}"
    learned = ("--method", "kd-mse", "--teacher", name, "--suite", "dim-stripes=20")
    done = dad_fast(package, "train", *learned, *common, "--log-to", "csv", "-o", str(run))
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "results.json").read_text())
    assert record["method"] == "kd-mse" and record["suites"]["dim-stripes"]["num_images"] == 20
    lines = (run / "metrics.csv").read_text().splitlines()
    assert any(line.startswith("train,") and ",mse," in line for line in lines)


def test_a_package_adds_a_discretizer(package: Path, tmp_path: Path) -> None:
    sizes = ("--max-steps", "2", "-b", "20", "--device", "cpu", "--set", "variants={}")
    asked = ("--preset", "demo", "--method", "dad", "--discretizer", "posterize:3", *sizes)
    done = dad_fast(package, "train", *asked, "--suite", "val", "-o", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/results.json").read_text())
    assert record["discretizer"]["name"] == "posterize:3"


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--method", "kd-msw", "did you mean kd-mse?"),
        ("--discretizer", "posterize:9", "write posterize:BITS"),
        ("--method", "python:my_package.kd_mse", "write python:MODULE:ATTRIBUTE"),
        ("--log-to", "python:my_package.nothing:Sink", "cannot import"),
    ],
)
def test_a_name_that_is_not_there_is_one_line(package, tmp_path, flag, name, message) -> None:
    asked = ("--preset", "demo", "--set", "variants={}", "--method", "dad", flag, name)
    done = dad_fast(package, "train", *asked, "-o", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not (tmp_path / "run").exists()
