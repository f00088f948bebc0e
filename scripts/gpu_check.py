"""The parts of scripts/gpu_check.sh. Each writes OUT/PART.json (machine, versions, commit, config, times, verdict) and OUT/PART.log.

tests   the tests marked `gpu`
demo    a few steps of every variant of the demo preset
vitb16  a few steps of kd and dad: ViT-B/16 student and teacher, VQGAN f8 with 16384 codes, all with random weights, on JPEGs made here
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NUM_CLASSES = 8
TIMED_METHODS = ("kd", "dad")


class Skipped(Exception):
    """This part cannot run here; the message says why."""


def require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")


def call(command: list[str], log: Path) -> str:
    """Run in the checkout, output appended to `log` as it comes; returns its last line, RuntimeError with it on failure."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    last_line = log.read_text(encoding="utf-8").strip().splitlines()[-1]
    if code:
        raise RuntimeError(f"exit code {code}: {last_line}")
    return last_line


def train(arguments: list[str], output: Path, log: Path) -> None:
    call([sys.executable, "-m", "dad_fast", "train", *arguments, "-o", str(output)], log)


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


def tests(options: argparse.Namespace, log: Path, work: Path) -> dict[str, Any]:
    closing_line = call([sys.executable, "-m", "pytest", "-m", "gpu", "-ra", "--continue-on-collection-errors", "tests"], log)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", closing_line)}
    if not counts.get("passed") and options.device != "cpu":
        raise RuntimeError(f"no test ran: {closing_line}")
    return {"counts": counts}


def demo(options: argparse.Namespace, log: Path, work: Path) -> dict[str, Any]:
    require("open_clip", "mlxtend", "sklearn")
    run = work / "demo"
    arguments = ["--preset", "demo", "--device", options.device, "--max-steps", str(options.steps), "--set", "log_every=2"]
    train(arguments, run, log)
    folders = sorted(path.parent for path in run.rglob("metrics.jsonl"))
    return {"steps": options.steps, "runs": {str(folder.relative_to(run)): speeds(folder) for folder in folders}}


def make_images(folder: Path, side: int = 256) -> None:
    """Smooth random JPEGs: train/ and val/ with one folder per class."""
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


def vitb16(options: argparse.Namespace, log: Path, work: Path) -> dict[str, Any]:
    import timm
    import torch
    from safetensors.torch import save_file

    from dad_fast.models.vqgan import PRESETS, VQGAN

    torch.manual_seed(0)
    model = "vit_base_patch16_224"
    save_file(timm.create_model(model, num_classes=NUM_CLASSES).state_dict(), work / "teacher.safetensors")
    VQGAN(PRESETS["f8-16384"]).save(work / "vqgan.safetensors", seen="nothing: random weights")
    make_images(work / "images")
    arguments = [
        *("--data-dir", str(work / "images"), "--student", model, "--teacher", f"timm:{model}@{work / 'teacher.safetensors'}"),
        *("--discretizer", str(work / "vqgan.safetensors"), "--batch-size", str(options.batch_size), "--workers", str(options.workers)),
        *("--max-steps", str(options.steps), "--epochs", "1000", "--set", "log_every=2", "--set", "eval.every_epochs=0"),
        *("--checkpoint-every-steps", str(options.steps)),
        *("--device", options.device),
        *(["--amp"] if options.device != "cpu" else []),  # 16-bit convolutions take minutes on a CPU
    ]
    runs = {}
    for method in TIMED_METHODS:
        train(["--method", method, *arguments], work / method, log)
        runs[method] = speeds(work / method)
    kd, dad = (runs[method]["img_per_s"]["median"] for method in TIMED_METHODS)
    return {"batch_size": options.batch_size, "steps": options.steps, "arguments": arguments, "runs": runs, "dad_over_kd_time": kd / dad}


def check(name: str, part: Callable[..., dict[str, Any]], options: argparse.Namespace, out: Path) -> str:
    """Run one part and write its result file; returns passed, failed or skipped."""
    from dad_fast.observe.runlog import environment

    file, log = out / f"{name}.json", out / f"{name}.log"
    file.unlink(missing_ok=True)  # an older verdict must not outlive a killed run
    log.write_text("", encoding="utf-8")
    started = time.time()
    result: dict[str, Any] = {"part": name, "device": options.device}
    with tempfile.TemporaryDirectory(prefix="dad-fast-gpu-check-") as work:
        os.environ["DAD_FAST_CACHE"] = f"{work}/cache"
        try:
            result |= {"verdict": "passed"} | part(options, log, Path(work))
        except Skipped as reason:
            result |= {"verdict": "skipped", "reason": str(reason)}
        except Exception as error:  # whatever failed belongs into the result file, and the next part still runs
            result |= {"verdict": "failed", "reason": f"{type(error).__name__}: {error}"}
    result |= {"seconds": round(time.time() - started, 1), "environment": environment()}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    why = f" ({result['reason']})" if "reason" in result else ""
    print(f"{name}: {result['verdict']}{why}, see {file}", flush=True)
    return result["verdict"]


def main() -> int:
    parts = {"tests": tests, "demo": demo, "vitb16": vitb16}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=["all", *parts])
    parser.add_argument("--steps", type=int, default=24, help="training steps per run")
    parser.add_argument("--batch-size", type=int, default=128, help="of the vitb16 part")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the vitb16 part")
    parser.add_argument("--device", default="cuda", help="cpu rehearses the script without a GPU")
    options = parser.parse_args()

    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; run it on a GPU machine (or rehearse with --device cpu)", file=sys.stderr)
        return 3
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    verdicts = [check(name, part, options, out) for name, part in parts.items() if options.part in ("all", name)]
    return int("failed" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
