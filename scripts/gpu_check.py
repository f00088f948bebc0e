"""The parts of scripts/gpu_check.sh, each under ten minutes. A part writes OUT/PART.json and OUT/PART.log; OUT/manifest.json lists them.

tests         the tests marked `gpu`, and dad-fast doctor --numerics where open_clip and the like are installed
bench-GROUP   one part per file benchmarks/test_GROUP.py, at size paper: ViT-B/16 from ViT-L/14, VQGAN f8
steps-base    whole steps against plain distillation at size base: ResNet-50 from ViT-B/16, VQGAN f16
demo          a few steps of every variant of the demo preset, through the real command
vitb16        a few steps of kd and dad by the real command: ViT-B/16 student and teacher, VQGAN f8, random weights, on JPEGs made here
profile       torch's profiler over the steps of vitb16
nsys          Nsight Systems over the steps of vitb16
ncu           Nsight Compute on this project's kernels in the steps of vitb16

What is not installed is skipped by name. Results of the benchmarks lie in OUT/benchmarks; scripts/gpu_report.py makes tables of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NUM_CLASSES = 8
TIMED_METHODS = ("kd", "dad")
LIMIT_SECONDS = 590.0  # of a part


class Skipped(Exception):
    """This part cannot run here; the message says why."""


@dataclass
class Context:
    """What a part gets."""

    options: argparse.Namespace
    out: Path
    log: Path
    work: Path  # a folder that is removed afterwards
    deadline: float

    def call(self, *command: str) -> str:
        """Run in the checkout, output appended to the log as it comes; returns its last line, RuntimeError with it on failure."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self.log.open("a", encoding="utf-8") as file:
            print("$", *command, file=file, flush=True)
            left = max(1.0, self.deadline - time.monotonic())
            try:
                code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=left).returncode
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"ran past {self.options.limit:g} s") from None
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code:
            raise RuntimeError(f"exit code {code}: {lines[-1]}")
        return lines[-1]

    def dad_fast(self, *arguments: str) -> str:
        return self.call(sys.executable, "-m", "dad_fast", *arguments)

    def pytest(self, *arguments: str) -> str:
        return self.call(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments)


def require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")


def require_tool(name: str) -> None:
    if shutil.which(name) is None:
        raise Skipped(f"not on the PATH: {name}")


# --- tests ---


def tests(run: Context) -> dict[str, Any]:
    closing_line = run.pytest("-m", "gpu", "-ra", "--continue-on-collection-errors", "tests")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", closing_line)}
    if not counts.get("passed") and run.options.device != "cpu":
        raise RuntimeError(f"no test ran: {closing_line}")
    result: dict[str, Any] = {"counts": counts}
    missing = [name for name in ("open_clip", "torchvision", "safetensors", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        return result | {"doctor": f"skipped, not installed: {', '.join(missing)}"}
    run.dad_fast("doctor", "--numerics")
    return result | {"doctor": "passed"}


# --- benchmarks ---


def benchmark(run: Context, group: str, size: str = "paper") -> dict[str, Any]:
    """Run a benchmark file; its record goes to OUT/benchmarks. On the CPU (a rehearsal) always at size tiny."""
    size = "tiny" if run.options.device == "cpu" else size
    target = ["--bench-size", size, "--bench-device", run.options.device, "--bench-out", str(run.out / "benchmarks")]
    closing_line = run.pytest(f"benchmarks/test_{group}.py", "--benchmark", "-ra", *target)
    if " passed" not in closing_line:
        raise Skipped(f"nothing ran: {closing_line}")
    return {"size": size, "tests": closing_line.strip("= ")}


def steps_base(run: Context) -> dict[str, Any]:
    return benchmark(run, "steps", "base")


# --- the real command ---


def speeds(run: Path) -> dict[str, Any]:
    """A run's images a second, by log window and without the first, which holds the warm-up; and its settings."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    windows = [row for row in rows if row["kind"] == "train"]
    if len(windows) < 3:
        raise RuntimeError(f"only {len(windows)} log lines of training: at least 3 are needed for a time with a spread")
    rates = [row["img_per_s"] for row in windows[1:]]
    return {
        "img_per_s": {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "windows": len(rates)},
        "gpu_memory_gib": max(row.get("gpu_memory", 0.0) for row in windows),
        "last": windows[-1],
        "config": (run / "config.toml").read_text(encoding="utf-8"),
    }


def demo(run: Context) -> dict[str, Any]:
    require("open_clip", "mlxtend", "sklearn")
    folder, steps = run.work / "demo", str(run.options.steps)
    run.dad_fast(
        *("train", "--preset", "demo", "--device", run.options.device, "--max-steps", steps, "--set", "log_every=2", "-o", str(folder))
    )
    folders = sorted(path.parent for path in folder.rglob("metrics.jsonl"))
    return {"steps": run.options.steps, "runs": {str(one.relative_to(folder)): speeds(one) for one in folders}}


def make_images(folder: Path, side: int = 320) -> None:
    """JPEGs of smooth noise: what decoding and training cost does not depend on what they show."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 2)):
        for label in range(NUM_CLASSES):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True)
            for i in range(count):
                small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                small.resize((side, side), Image.Resampling.BICUBIC).save(target / f"{i}.jpg", quality=90)


def vitb16_settings(run: Context) -> list[str]:
    """Weights and images made in run.work, and the flags of dad-fast train that use them."""
    import timm
    import torch
    from safetensors.torch import save_file

    from dad_fast.models.vqgan import PRESETS, VQGAN

    torch.manual_seed(0)
    work, options, model = run.work, run.options, "vit_base_patch16_224"
    save_file(timm.create_model(model, num_classes=NUM_CLASSES).state_dict(), work / "teacher.safetensors")
    VQGAN(PRESETS["f8-16384"]).save(work / "vqgan.safetensors", seen="nothing: random weights")
    make_images(work / "images")
    return [
        *("--data-dir", str(work / "images"), "--student", model, "--teacher", f"timm:{model}@{work / 'teacher.safetensors'}"),
        *("--discretizer", str(work / "vqgan.safetensors"), "--batch-size", str(options.batch_size), "--workers", str(options.workers)),
        *("--epochs", "1000", "--device", options.device),
        *(["--amp"] if options.device != "cpu" else []),  # 16-bit convolutions take minutes on a CPU
    ]


def vitb16(run: Context) -> dict[str, Any]:
    steps = run.options.steps
    watched = ("--max-steps", str(steps), "--set", "log_every=2", "--set", "eval.every_epochs=0", "--checkpoint-every-steps", str(steps))
    settings = vitb16_settings(run)
    runs = {}
    for method in TIMED_METHODS:
        run.dad_fast("train", "--method", method, *settings, *watched, "-o", str(run.work / method))
        runs[method] = speeds(run.work / method)
    kd, dad = (runs[method]["img_per_s"]["median"] for method in TIMED_METHODS)
    return {"batch_size": run.options.batch_size, "steps": steps, "runs": runs, "dad_over_kd_time": kd / dad}


def profiled(run: Context, kind: str, *flags: str) -> dict[str, Any]:
    run.dad_fast("profile", kind, "--method", "dad", *vitb16_settings(run), *flags, "-o", str(run.out / kind))
    return {"files": sorted(path.name for path in (run.out / kind).iterdir())}


def profile(run: Context) -> dict[str, Any]:
    return profiled(run, "torch", "--steps", "2", "--warm-up", str(min(5, run.options.steps)))


def nsys(run: Context) -> dict[str, Any]:
    require_tool("nsys")
    return profiled(run, "nsys")


def ncu(run: Context) -> dict[str, Any]:
    require_tool("ncu")
    return profiled(run, "ncu", "--launches", "30")


GROUPS = sorted(path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py"))
PARTS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "tests": tests,
    **{f"bench-{group}": partial(benchmark, group=group) for group in GROUPS},
    "steps-base": steps_base,
    "demo": demo,
    "vitb16": vitb16,
    "profile": profile,
    "nsys": nsys,
    "ncu": ncu,
}


# --- running the parts ---


def check(name: str, options: argparse.Namespace, out: Path) -> str:
    """Run one part, write its result file and enter it in the manifest; returns passed, failed or skipped."""
    from dad_fast.observe.runlog import environment

    file, log = out / f"{name}.json", out / f"{name}.log"
    file.unlink(missing_ok=True)  # an older verdict must not outlive a killed run
    log.write_text("", encoding="utf-8")
    started = time.monotonic()
    result: dict[str, Any] = {"part": name, "device": options.device}
    with tempfile.TemporaryDirectory(prefix="dad-fast-gpu-check-") as work:
        os.environ["DAD_FAST_CACHE"] = f"{work}/cache"
        try:
            result |= {"verdict": "passed"} | PARTS[name](Context(options, out, log, Path(work), started + options.limit))
        except Skipped as reason:
            result |= {"verdict": "skipped", "reason": str(reason)}
        except Exception as error:  # whatever failed belongs into the result file, and the next part still runs
            result |= {"verdict": "failed", "reason": f"{type(error).__name__}: {error}"}
    result |= {"seconds": round(time.monotonic() - started, 1), "environment": environment()}
    write(file, result)
    enter(out / "manifest.json", {key: result[key] for key in ("part", "device", "verdict", "reason", "seconds") if key in result})
    why = f" ({result['reason']})" if "reason" in result else ""
    print(f"{name}: {result['verdict']}{why}, {result['seconds']} s, see {file}", flush=True)
    return str(result["verdict"])


def enter(manifest: Path, entry: dict[str, Any]) -> None:
    """Replace the entry of that part; parts may be run one at a time, by several calls."""
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else []
    kept = [other for other in entries if other["part"] != entry["part"]]
    write(manifest, sorted([*kept, entry], key=lambda one: list(PARTS).index(one["part"])))


def write(file: Path, value: Any) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="by default all of them")
    parser.add_argument("--steps", type=int, default=24, help="training steps per run of demo and vitb16")
    parser.add_argument("--batch-size", type=int, default=128, help="of the vitb16 settings")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the vitb16 settings")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds after which a part is stopped [590]")
    parser.add_argument("--device", default="cuda", help="cpu rehearses the script without a GPU")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in (*PARTS, "all")]:
        parser.error(f"unknown part {unknown[0]} (parts: {', '.join(PARTS)})")

    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; run it on a GPU machine (or rehearse with --device cpu)", file=sys.stderr)
        return 3
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = PARTS if not options.parts or "all" in options.parts else dict.fromkeys(options.parts)
    return int("failed" in [check(name, options, out) for name in wanted])


if __name__ == "__main__":
    sys.exit(main())
