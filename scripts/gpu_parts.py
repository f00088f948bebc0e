"""Parts of gpu_check.py: the commands of each, and its result."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NUM_CLASSES = 8
TIMED_METHODS = ("kd", "dad")


class Skipped(Exception):
    """Raised by a part that cannot run here, with the reason."""


@dataclass
class Context:
    """Options, folders and deadline of a part."""

    options: argparse.Namespace
    out: Path
    log: Path
    work: Path  # removed after the part
    deadline: float

    def call(self, *command: str) -> str:
        """Run a command in the checkout and append its output to the log; return the last line.

        Raises RuntimeError with that line on failure.
        """
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        with self.log.open("a", encoding="utf-8") as file:
            print("$", *command, file=file, flush=True)
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=max(1.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"ran past {self.options.limit:.3g} s") from None
            finally:
                stop(process)
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code:
            raise RuntimeError(f"exit code {code}: {lines[-1]}")
        return lines[-1]

    def dad_fast(self, *arguments: str) -> str:
        return self.call(sys.executable, "-m", "dad_fast", *arguments)

    def pytest(self, *arguments: str) -> str:
        return self.call(
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", *arguments
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command and its children: SIGINT first, so that pytest still reports, then SIGKILL."""
    for number, seconds in ((signal.SIGINT, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # all processes have ended
            return
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.2)


def require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")


def require_tool(name: str) -> None:
    if shutil.which(name) is None:
        raise Skipped(f"not on the PATH: {name}")


# --- correctness ---


def doctor(run: Context) -> dict[str, Any]:
    require("open_clip", "torchvision", "safetensors", "rich")
    run.dad_fast("doctor", "--numerics")
    return {}


def csrc(run: Context) -> dict[str, Any]:
    import torch

    require("tvm_ffi")
    require_tool("cmake")
    build = f"build/gpu-check-{sys.version_info.major}{sys.version_info.minor}"
    flags = [f"-DPython_EXECUTABLE={sys.executable}"]
    if run.options.device != "cpu":
        major, minor = torch.cuda.get_device_capability()
        flags.append(f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}{'a' if major >= 9 else ''}-real")
    run.call("cmake", "-S", ".", "-B", build, *flags)
    run.call("cmake", "--build", build, "--parallel")
    run.call("cmake", "--install", build, "--prefix", str(ROOT))
    status = "from dad_fast.kernels.csrc import csrc_status, csrc_cuda_status as cuda; print(csrc_status(), '; CUDA:', cuda())"
    return {"status": run.call(sys.executable, "-c", status).replace(f"{ROOT}/", "")}


def tests(run: Context) -> dict[str, Any]:
    several = []
    if importlib.util.find_spec("xdist"):
        several = ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    set_timeout = ["--timeout", "120"] if importlib.util.find_spec("pytest_timeout") else []
    closing_line = run.pytest(
        "-m", "gpu", "--continue-on-collection-errors", *several, *set_timeout, "tests"
    )
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", closing_line)
    }
    if not counts.get("passed") and run.options.device != "cpu":
        raise RuntimeError(f"no test ran: {closing_line}")
    return {"counts": counts}


# --- benchmarks ---


def benchmark(run: Context, group: str, size: str = "paper") -> dict[str, Any]:
    """Run a benchmark file; write its record to OUT/benchmarks.

    On the CPU (a rehearsal) the size is tiny.
    """
    size = "tiny" if run.options.device == "cpu" else size
    target = [
        "--bench-size",
        size,
        "--bench-device",
        run.options.device,
        "--bench-out",
        str(run.out / "benchmarks"),
    ]
    closing_line = run.pytest(f"benchmarks/test_{group}.py", "--benchmark", *target)
    if " passed" not in closing_line:
        raise Skipped(f"nothing ran: {closing_line}")
    return {"size": size, "tests": closing_line.strip("= ")}


def steps_base(run: Context) -> dict[str, Any]:
    return benchmark(run, "steps", "base")


# --- the real command ---


def speeds(run: Path) -> dict[str, Any]:
    """Return a run's images per second over its log windows without the first (warm-up), and its
    settings.
    """
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    windows = [row for row in rows if row["kind"] == "train"]
    if len(windows) < 3:
        raise RuntimeError(
            f"only {len(windows)} log lines of training: at least 3 are needed for a time with a "
            "spread"
        )
    rates = [row["img_per_s"] for row in windows[1:]]
    return {
        "img_per_s": {
            "median": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
            "windows": len(rates),
        },
        "gpu_memory_gib": max(row.get("gpu_memory", 0.0) for row in windows),
        "last": windows[-1],
        "config": (run / "config.toml").read_text(encoding="utf-8"),
    }


def demo(run: Context) -> dict[str, Any]:
    require("open_clip", "mlxtend", "sklearn")
    folder, steps = run.work / "demo", str(run.options.steps)
    flags = ["--device", run.options.device, "--max-steps", steps, "--set", "log_every=2"]
    run.dad_fast("train", "--preset", "demo", *flags, "-o", str(folder))
    folders = sorted(path.parent for path in folder.rglob("metrics.jsonl"))
    return {
        "steps": run.options.steps,
        "runs": {str(one.relative_to(folder)): speeds(one) for one in folders},
    }


def make_images(folder: Path, side: int = 320) -> None:
    """Write JPEGs of smooth noise: the cost of decoding and training does not depend on the
    content.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 2)):
        for label in range(NUM_CLASSES):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True)
            for i in range(count):
                small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                small.resize((side, side), Image.Resampling.BICUBIC).save(
                    target / f"{i}.jpg", quality=90
                )


def vitb16_settings(run: Context) -> list[str]:
    """Make weights and images in run.work; return the flags of dad-fast train that use them."""
    import timm
    import torch
    from safetensors.torch import save_file

    from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN

    torch.manual_seed(0)
    work, options = run.work, run.options
    model = "vit_base_patch16_224"
    teacher = timm.create_model(model, num_classes=NUM_CLASSES)
    save_file(teacher.state_dict(), work / "teacher.safetensors")
    VQGAN(PRESETS["f8-16384"]).save(work / "vqgan.safetensors", seen="nothing: random weights")
    make_images(work / "images")
    flags = {
        "--data-dir": work / "images",
        "--student": model,
        "--teacher": f"timm:{model}@{work / 'teacher.safetensors'}",
        "--discretizer": work / "vqgan.safetensors",
        "--batch-size": options.batch_size,
        "--workers": options.workers,
        "--epochs": 1000,
        "--device": options.device,
    }
    words = [str(word) for item in flags.items() for word in item]
    # 16-bit convolutions take minutes on a CPU.
    return words if options.device == "cpu" else [*words, "--amp"]


def vitb16(run: Context) -> dict[str, Any]:
    steps = run.options.steps
    watched = (
        "--max-steps",
        str(steps),
        "--set",
        "log_every=2",
        "--set",
        "eval.every_epochs=0",
        "--checkpoint-every-steps",
        str(steps),
    )
    settings = vitb16_settings(run)
    runs = {}
    for method in TIMED_METHODS:
        run.dad_fast("train", "--method", method, *settings, *watched, "-o", str(run.work / method))
        runs[method] = speeds(run.work / method)
    kd, dad = (runs[method]["img_per_s"]["median"] for method in TIMED_METHODS)
    return {
        "batch_size": run.options.batch_size,
        "steps": steps,
        "runs": runs,
        "dad_over_kd_time": kd / dad,
    }


def profiled(run: Context, kind: str, *flags: str) -> dict[str, Any]:
    run.dad_fast(
        "profile", kind, "--method", "dad", *vitb16_settings(run), *flags, "-o", str(run.out / kind)
    )
    return {"files": sorted(path.name for path in (run.out / kind).iterdir())}


def profile(run: Context) -> dict[str, Any]:
    return profiled(run, "torch", "--steps", "2", "--warm-up", str(min(5, run.options.steps)))


def nsys(run: Context) -> dict[str, Any]:
    require_tool("nsys")
    return profiled(run, "nsys")


def ncu(run: Context) -> dict[str, Any]:
    require_tool("ncu")
    found = profiled(run, "ncu", "--launches", "30", "--set", "engine.kernels=on")
    # Into the log.
    run.call("ncu", "--import", str(run.out / "ncu" / "profile.ncu-rep"), "--page", "details")
    return found


def tuning(run: Context) -> dict[str, Any]:
    if run.options.device == "cpu":
        raise Skipped("times kernels on a GPU")
    table = ROOT / "kernels" / "tuning.json"
    run.call(sys.executable, "-m", "dad_fast.kernels.tuning", "--write")
    shutil.copy(table, run.out)
    return {"table": table.name}
