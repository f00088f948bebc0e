"""Check this checkout on a CUDA machine, in parts. A part whose package or tool is missing is
skipped by name.

                 minutes, estimated for one H200 and 16 cores; not yet run on a GPU
doctor        1  installed packages; codebook search and attack on this GPU against float64
csrc          1  builds the compiled half for this GPU (needs apache-tvm-ffi, cmake, nvcc);
                 later parts use it
tests         4  the tests marked `gpu`
bench-GROUP      one part per file benchmarks/test_GROUP.py, at size paper: ViT-B/16 from ViT-L/14,
                 VQGAN f8; minutes: steps 7, stages 3, stored 3, nearest_code 4, vqgan 6,
                 step_kernels 7, optimizers 1
steps-base    3  whole steps against plain distillation at size base: ResNet-50 from ViT-B/16,
                 VQGAN f16
demo          1  a few steps of every variant of the demo preset, through the real command
vitb16        2  a few steps of kd and dad by the real command: ViT-B/16 student and teacher,
                 VQGAN f8, random weights, generated JPEGs
profile       1  torch's profiler over the steps of vitb16
nsys          1  Nsight Systems over the steps of vitb16
ncu           2  Nsight Compute on this project's kernels in the steps of vitb16
tuning        5  times the Triton kernels' meta-parameters; tuning.json gets the fastest

With a GPU for half an hour, in calls of ten minutes, in order of value (each name runs several
parts):

    scripts/gpu_check.sh --minutes 9.5 right    correctness of kernels, graphs, command; stages
    scripts/gpu_check.sh --minutes 9.5 steps    ratios of whole steps: graphs or not, with stores
    scripts/gpu_check.sh --minutes 9.5 kernels  kernels against torch.compile, lookups, ncu
    scripts/gpu_check.sh --minutes 9.5 rest     meta-parameters, optimizations, the smaller models

A bare checkout with torch, triton, timm and pytest is enough for most parts. On a machine without a
package index put these into .whl/ (7 MB; gpu_check.sh installs them into a folder of its own):

    pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \\
        --platform manylinux2014_x86_64 -d .whl open_clip_torch ftfy wcwidth apache-tvm-ffi mlxtend

In a copy without git history set the commit for the records: DAD_FAST_COMMIT=$(git rev-parse HEAD).

Results: runs/gpu_check/PART.json and .log, manifest.json, benchmarks/; scripts/gpu_report.py makes
tables of the records. A summary of less than 12,000 characters is printed last. With OUT set,
OUT/gpu_check.tar.gz and OUT/summary.txt are written after every part, so that a killed call keeps
its results. A failed part does not stop the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import gpu_parts as parts
from gpu_parts import Context, Skipped
from gpu_targets import targets

LIMIT_SECONDS = 590.0  # of a part
SUMMARY_CHARACTERS = 11_000
FAILURES, FAILURE_CHARACTERS = 12, 240  # of a part, in its result

GROUPS = sorted(path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py"))
PARTS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "doctor": parts.doctor,
    "csrc": parts.csrc,
    "tests": parts.tests,
    **{f"bench-{group}": partial(parts.benchmark, group=group) for group in GROUPS},
    "steps-base": parts.steps_base,
    "demo": parts.demo,
    "vitb16": parts.vitb16,
    "profile": parts.profile,
    "nsys": parts.nsys,
    "ncu": parts.ncu,
    "tuning": parts.tuning,
}
CALLS = {
    "right": ["doctor", "csrc", "tests", "vitb16", "bench-stages"],
    "steps": ["bench-steps", "bench-stored"],
    "kernels": ["bench-vqgan", "bench-nearest_code", "ncu", "bench-optimizers", "profile"],
    "rest": ["tuning", "bench-step_kernels", "steps-base", "demo"],
}


def check(name: str, options: argparse.Namespace, out: Path) -> str:
    """Run one part, write its result file and manifest entry; return passed, failed or skipped."""
    from dad_fast.loggers.environment import environment

    file, log = out / f"{name}.json", out / f"{name}.log"
    log.write_text("", encoding="utf-8")
    # A killed run leaves this entry.
    finish(out, file, {"part": name, "device": options.device, "verdict": "running"})
    started = time.monotonic()
    result: dict[str, Any] = {"part": name, "device": options.device}
    with tempfile.TemporaryDirectory(prefix="dad-fast-gpu-check-") as work:
        os.environ["DAD_FAST_CACHE"] = f"{work}/cache"
        try:
            context = Context(options, out, log, Path(work), started + options.limit)
            result |= {"verdict": "passed"} | PARTS[name](context)
        except Skipped as reason:
            result |= {"verdict": "skipped", "reason": str(reason)}
        # The failure goes into the result file, and the next part still runs.
        except Exception as error:
            result |= {"verdict": "failed", "reason": f"{type(error).__name__}: {error}"}
    if result["verdict"] == "failed" and (found := failures(log)):
        result["failures"] = found
    result |= {"seconds": round(time.monotonic() - started, 1), "environment": environment()}
    finish(out, file, result)
    why = f" ({result['reason']})" if "reason" in result else ""
    print(f"{name}: {result['verdict']}{why}, {result['seconds']} s, see {file}", flush=True)
    return str(result["verdict"])


def failures(log: Path) -> list[str]:
    """Return the lines of a log that name failures; for pytest those of its summary."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line for line in lines if line.startswith(("FAILED ", "ERROR "))] or lines[-6:]
    more = [f"and {len(named) - FAILURES} more"] if len(named) > FAILURES else []
    return [line[:FAILURE_CHARACTERS] for line in named[:FAILURES]] + more


def finish(out: Path, file: Path, result: dict[str, Any]) -> None:
    """Write a part's result and manifest entry; if OUT is set, pack all results there."""
    write(file, result)
    keys = ("part", "device", "verdict", "reason", "failures", "counts", "status", "seconds")
    enter(out / "manifest.json", {key: result[key] for key in keys if key in result})
    target = os.environ.get("OUT")
    if not target:
        return
    Path(target).mkdir(parents=True, exist_ok=True)
    (Path(target) / "summary.txt").write_text(summary(out), encoding="utf-8")
    packed = Path(target) / "gpu_check.tar.gz"
    with tarfile.open(packed.with_suffix(".tmp"), "w:gz") as archive:
        archive.add(out, "gpu_check")
    packed.with_suffix(".tmp").replace(packed)


def summary(out: Path) -> str:
    """Return the summary: a line per part, its failures, and the targets."""
    lines = []
    for entry in json.loads((out / "manifest.json").read_text(encoding="utf-8")):
        rest = {
            key: value
            for key, value in entry.items()
            if key not in ("part", "verdict", "failures", "device")
        }
        details = ", ".join(f"{key} {value}" for key, value in rest.items())[:300]
        lines.append(f"{entry['part']:<20} {entry['verdict']:<8} {details}")
        lines += [f"    {line}" for line in entry.get("failures", [])]
    return "\n".join([*lines, "", *targets(out / "benchmarks")])[:SUMMARY_CHARACTERS] + "\n"


def enter(manifest: Path, entry: dict[str, Any]) -> None:
    """Replace the manifest entry of one part; several calls may run parts one at a time."""
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else []
    kept = [other for other in entries if other["part"] != entry["part"]]
    write(manifest, sorted([*kept, entry], key=lambda one: list(PARTS).index(one["part"])))


def write(file: Path, value: Any) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help="parts, or names of calls [all parts]",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="limit of the whole call: parts that no longer fit are left out, a running part is stopped",
    )
    parser.add_argument(
        "--steps", type=int, default=24, help="training steps per run of demo and vitb16"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="of the vitb16 settings")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the vitb16 settings"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT_SECONDS,
        help="seconds after which a part is stopped [590]",
    )
    parser.add_argument("--device", default="cuda", help="cpu rehearses the script without a GPU")
    options = parser.parse_args()
    started = time.monotonic()
    wanted = [
        part
        for name in options.parts or ["all"]
        for part in (PARTS if name == "all" else CALLS.get(name, [name]))
    ]
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(
            f"unknown part {unknown[0]} (parts: {', '.join(PARTS)}; calls: {', '.join(CALLS)})"
        )

    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "gpu_check: torch sees no CUDA device here; run it on a GPU machine (or rehearse with "
            "--device cpu)",
            file=sys.stderr,
        )
        return 3
    out = ROOT / "runs" / "gpu_check"
    out.mkdir(parents=True, exist_ok=True)
    limit, verdicts = options.limit, []
    for name in dict.fromkeys(wanted):
        if options.minutes is not None:
            # Keep 15 s to stop the part and to pack.
            left = 60 * options.minutes - (time.monotonic() - started) - 15
            options.limit = min(limit, left)
            if options.limit < 20:
                print(f"{name}: no time left", flush=True)
                continue
        verdicts.append(check(name, options, out))
    print(f"\n{summary(out)}", end="", flush=True)
    return int("failed" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
