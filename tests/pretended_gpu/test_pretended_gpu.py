"""Presets at real size, commands and GPU tests on the pretended GPU (`make test-pretended-gpu`)."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.pretended_gpu import build

pytestmark = pytest.mark.pretended_gpu
ROOT = Path(__file__).parent.parent.parent
EXPECTED = tomllib.loads(Path(__file__).with_name("expected.toml").read_text(encoding="utf-8"))
ON_80_GB = 79.2  # GiB that a card of 80 GB offers


@pytest.fixture(scope="session")
def library():
    if reason := build.missing():
        pytest.skip(reason)
    return build.build(ROOT / "build/pretended_gpu")


def run(library, *module, expandable=False, **settings):
    """Run `python -m MODULE ARGUMENT...` on the pretended GPU."""
    environment = build.environment(library, **settings)
    if expandable:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return subprocess.run(
        [sys.executable, "-m", *module],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=1200,
    )


def steps(library, preset, *options, **settings):
    done = run(library, "tests.pretended_gpu.steps", preset, *options, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_capture_rules_hold_and_memory_ends(library):
    program = """
import torch
x = torch.ones(64, 64, device="cuda")
x @ x
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    x @ x
graph.replay()
refused = 0
event = torch.cuda.Event()
event.record()
for forbidden in (lambda: x.sum().item(), torch.cuda.synchronize, event.query):
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            forbidden()
    except RuntimeError:
        refused += 1
assert refused == 3
try:
    torch.empty(80 << 30, dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    print("all as expected")
"""
    environment = build.environment(library, gib=79)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "all as expected\n", done.stderr[-2000:]


@pytest.mark.parametrize("name", EXPECTED["steps"])
def test_a_preset_is_captured_at_real_size(library, name):
    """No sync, nothing beside the graphs, and the launches and memory that are on record."""
    expected = dict(EXPECTED["steps"][name])
    options, expandable = expected.pop("options"), expected.pop("expandable", False)
    found = steps(library, *options, expandable=expandable)
    assert found["broken"] == found["syncs"] == 0
    assert found["captured"] == ("off" not in options)
    import torch

    if not torch.__version__.startswith(EXPECTED["torch"]):
        return  # another torch launches other kernels
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=EXPECTED["tolerance"]), (key, found)


def test_the_flagship_is_captured_on_80_gb_with_expandable_segments(library):
    found = steps(library, "dad-vitb16", expandable=True, gib=ON_80_GB)
    assert found["captured"] and found["reserved_gib"] < ON_80_GB


@pytest.mark.parametrize("preset", ["demo", "lp-clip-demo"])
def test_the_train_command_runs_on_a_gpu(library, tmp_path, preset):
    train = ("dad_fast", "train", "--preset", preset, "--device", "cuda")
    printed = run(library, *train, "--print-config")
    assert printed.returncode == 0, printed.stderr
    assert tomllib.loads(printed.stdout)["device"] == "cuda"
    for words in ("auto on cuda:0, Pretended GPU", "amp: on (this GPU computes in bfloat16)"):
        assert words in printed.stdout, printed.stdout
    out = tmp_path / "run"
    done = run(library, "tests.pretended_gpu.values", *train, "--max-steps", "6", "-o", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Pretended GPU" in next(out.rglob("run.json")).read_text(encoding="utf-8")


def test_the_train_command_runs_on_a_gpu_with_several_students(library, tmp_path):
    """One graph for each learner and one for their batches."""
    out = tmp_path / "run"
    train = ("dad_fast", "train", "--preset", "demo", "--method", "dad", "--device", "cuda")
    more = ("--student", "resnet18", "resnet26", "--max-steps", "6", "-o", str(out))
    done = run(library, "tests.pretended_gpu.values", *train, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    log = (out / "resnet18/seed-0/train.log").read_text(encoding="utf-8")
    assert "the step is captured in CUDA graphs" in log and "shares   its batches with" in log
    assert (out / "resnet26/seed-0/results.json").exists()


def test_a_compiled_step_is_captured(library, tmp_path):
    """Inductor's CUDA code in the trial, and then in CUDA graphs."""
    out = tmp_path / "run"
    train = ("dad_fast", "train", "--preset", "demo", "--method", "dad", "--device", "cuda")
    more = ("--torchcompile", "on", "--max-steps", "6", "-o", str(out))
    done = run(library, "tests.pretended_gpu.values", *train, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "outputs and gradients are those of eager" in done.stderr
    assert "the step is captured in CUDA graphs" in (out / "train.log").read_text(encoding="utf-8")


def test_benchmarks_start_on_a_gpu(library, tmp_path):
    """`--bench-device cuda` failed in torch.cuda.set_device."""
    done = run(
        library,
        *("pytest", "-p", "tests.pretended_gpu.values", "benchmarks/test_optimizers.py"),
        *("--benchmark", "--bench-device", "cuda", "--bench-size", "tiny"),
        *("--bench-out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_gpu_tests_run_to_their_assertions(library):
    """Left out: kernels (hours of Triton's compiler), DALI (a driver), corruptions (loops)."""
    parts = ("engine", "discretizers", "loggers", "evaluation/test_runner.py")
    # Without --assert=plain a failure prints tensors, whose printing depends on values.
    how = ("-p", "tests.pretended_gpu.values", "-m", "gpu", "-q", "--assert=plain")
    done = run(library, "pytest", *how, *(f"tests/{part}" for part in parts))
    assert done.returncode == 0, done.stdout[-3000:]
