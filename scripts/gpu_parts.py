"""Parts of scripts/gpu_check.py: their commands and time limits, in order of value."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra"]
ROUNDS = {"cuda": 5, "cpu": 1}


class Skipped(Exception):
    """Raised for a part that cannot run here, with the reason."""


@dataclass(frozen=True)
class Call:
    """What the commands of a part depend on. seconds: the part's time limit."""

    device: str
    size: str
    out: Path
    seconds: float

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


Commands = Callable[[Call], list[list[str]]]


class Part(NamedTuple):
    name: str
    seconds: float  # of a run of 9.5 minutes
    summary: str
    commands: Commands
    side_by_side: int = 1


def bench(group: str, on_gpu: str = "", on_cpu: str = "") -> Commands:
    """Run benchmarks/test_GROUP.py, or its tests that pytest's -k selects."""

    def commands(call: Call) -> list[list[str]]:
        options = {
            "--bench-size": call.size,
            "--bench-device": call.device,
            "--bench-rounds": ROUNDS["cuda" if call.on_gpu else "cpu"],
            "--bench-out": call.out / "records",
            "-k": (on_gpu if call.on_gpu else on_cpu) or group,
        }
        words = [str(word) for item in options.items() for word in item]
        return [[*PYTEST, f"benchmarks/test_{group}.py", "--benchmark", *words]]

    return commands


def csrc(call: Call) -> list[list[str]]:
    """Build the compiled half for this GPU into the checkout; on a CPU only configure it."""
    if importlib.util.find_spec("tvm_ffi") is None:
        raise Skipped("not installed: apache-tvm-ffi")
    if shutil.which("cmake") is None:
        raise Skipped("not on the PATH: cmake")
    build = f"build/gpu-check-{sys.version_info.major}{sys.version_info.minor}"
    configure = ["cmake", "-S", ".", "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
    if not call.on_gpu:
        return [configure]
    status = "from dad_fast.kernels.csrc import csrc_cuda_status as s; print('CUDA:', s())"
    return [
        configure,
        ["cmake", "--build", build, "--parallel"],
        ["cmake", "--install", build, "--prefix", str(ROOT)],
        [sys.executable, "-c", status],
    ]


def gpu_tests(call: Call) -> list[list[str]]:
    """Run the tests marked `gpu`, a process per file: a broken context costs one file."""
    files = [
        path.relative_to(ROOT)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    # Kernels compile, so they take longest.
    files.sort(key=lambda path: "kernels" not in path.parts)
    return [[*PYTEST, "-m", "gpu", str(path)] for path in (files if call.on_gpu else files[:2])]


def tuning(call: Call) -> list[list[str]]:
    """Time the kernels' meta-parameters for as long as the part has; exit code 3 without a GPU."""
    seconds = str(max(5.0, call.seconds - 12.0))
    command = [sys.executable, "-m", "dad_fast.kernels.tuning", "--seconds", seconds]
    return [[*command, "--write", str(call.out / "tuning.json")]]


PARTS = (
    Part("ceilings", 20, "matrix product in bf16, copy", bench("ceilings")),
    Part(
        "smoke", 60, "DAD at batch 64 plain, in graphs, with kernels: same losses", bench("smoke")
    ),
    Part(
        "steps",
        150,
        "KD and DAD at batch 256 in turns: plain, graphs, kernels, compiled",
        bench("steps", "forms and 256", "forms and 32"),
    ),
    Part(
        "stages",
        60,
        "each stage at batch 256; encode and decode by norm and attention",
        bench("stages", "256", "32"),
    ),
    Part("csrc", 25, "build the compiled codebook search for this GPU", csrc),
    Part("tests", 65, "pytest -m gpu, eight files at a time", gpu_tests, side_by_side=8),
    Part(
        "train",
        75,
        "dad-fast train: 24 steps, 4 more after a resume",
        bench("end_to_end", "command", "command"),
    ),
    Part(
        "memory",
        50,
        "a step at batch 256 within 79 GiB and the card, segments expandable or fixed",
        bench("memory", "", "whole and expandable"),
    ),
    Part(
        "vqgan",
        30,
        "upsampling, attention, group norm against their alternatives",
        bench("vqgan", "upsample or attention or group_norm", "attention and 196"),
    ),
    Part("tuning", 20, "kernels' meta-parameters, as many as fit", tuning),
)
