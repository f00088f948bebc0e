"""Pytest options of the benchmarks: --benchmark, --overhead-compare, --bench-* and wrong options."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
from tests import warm

ROOT = Path(__file__).parents[2]


STEPS = """
from types import SimpleNamespace
from benchmarks import timing

now = 0.0

def work(seconds):
    def run():
        global now
        now += seconds
    return run

def test_steps(bench, monkeypatch):
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    bench.compare("batch 32", {"kd": work(0.01), "dad": work(FACTOR * 0.01)}, baseline="kd", work=1, seconds=0)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a benchmark folder with the real conftest."""
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_steps.py").write_text(STEPS.replace("FACTOR", "2"))
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        ".",
        "-q",
        "-p",
        "no:cacheprovider",
        "--bench-out",
        "out",
        *arguments,
    ]
    return warm.run(command, cwd=folder)


def test_the_folder_skips_without_the_option(folder: Path) -> None:
    done = run(folder, "-rs")
    assert (
        done.returncode == 0
        and "a benchmark: run with --benchmark" in done.stdout
        and not (folder / "out").exists()
    )


def test_the_option_runs_writes_and_compares(folder: Path) -> None:
    done = run(folder, "--benchmark")
    assert done.returncode == 0, done.stdout
    assert (
        "steps, size tiny" in done.stdout
        and "ratio to 'kd'" in done.stdout
        and "only the ratios" in done.stdout
    )
    (record,) = (folder / "out").glob("tiny-cpu-*/steps.json")
    kept = shutil.copy(record, folder / "before.json")
    (folder / "test_steps.py").write_text(STEPS.replace("FACTOR", "3"))
    done = run(folder, "--benchmark", "--overhead-compare", str(kept), "--fail-over", "20%")
    assert done.returncode == 1 and "benchmarks: batch 32, against kd: dad costs" in done.stdout, (
        done.stdout
    )


@pytest.mark.slow  # starts pytest again
def test_comparison_without_steps_fails(folder: Path) -> None:
    (folder / "test_steps.py").write_text(
        "import pytest\ndef test_steps(bench): pytest.skip('no package')\n"
    )
    done = run(folder, "--benchmark")
    assert done.returncode == 1 and "no step benchmark ran" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overhead-compare", "none.json"], "none.json: cannot be read"),
        pytest.param(["--fail-over", "much"], "--fail-over much", marks=pytest.mark.slow),
        pytest.param(["--bench-size", "x"], "tiny", marks=pytest.mark.slow),
    ],
)
def test_wrong_options_are_usage_errors(folder: Path, arguments: list[str], message: str) -> None:
    done = run(folder, "--benchmark", *arguments)
    assert done.returncode == 4 and message in done.stderr


@pytest.mark.slow  # starts pytest again
def test_pytest_benchmark_may_be_installed_too(folder: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = run(folder, "--benchmark", "--benchmark-disable")
    assert done.returncode == 0 and "ratio to 'kd'" in done.stdout, done.stdout + done.stderr
