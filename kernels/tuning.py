"""Meta-parameters of the Triton kernels: a committed table per architecture and shape bucket, and
its measuring tool.

The table, tuning.json: kernel -> architecture -> entries, tried in order. An entry fits a shape if
each of its bounds under "max" is at least the shape's; the last entry of a list has no bound.
@triton.autotune is not used: it needs a GPU at import, and ranks with different timings would run
different kernels. Fixed entries give the same kernel and the same codes everywhere.

    python -m dad_fast.kernels.tuning [KERNEL ...] [--seconds S] [--write [FILE]]

times every candidate on a GPU (within S seconds as many as fit, those of the table first), prints,
and rewrites this GPU's entries.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tuning.json")
# Set while launches are recorded for another GPU than this machine's (launches.py).
assumed_architecture = ""
CHOOSERS = ("dad_fast.kernels.wide_attention",)  # tables that choose between other people's kernels


def triton_modules() -> list[str]:
    """Return the modules of kernels/ with a Triton kernel, as dad_fast.kernels.*."""
    files = sorted(
        path
        for path in TABLE.parent.rglob("*.py")
        if re.search(r"^@triton\.jit", path.read_text(encoding="utf-8"), re.MULTILINE)
    )
    return [
        ".".join(("dad_fast.kernels", *path.relative_to(TABLE.parent).with_suffix("").parts))
        for path in files
    ]


@dataclass(frozen=True)
class TuningCase:
    """Table entry to measure: `run(meta)` does the work once with these meta-parameters."""

    kernel: str
    bounds: dict[str, int]  # the entry's "max"
    candidates: list[dict[str, int]]
    run: Callable[[dict[str, int]], Any]


def architecture(device: torch.device | str) -> str:
    """Return the table's name of a CUDA device (newer devices use the newest); sm_80 for a CPU (the
    interpreter).
    """
    device = torch.device(device)
    if assumed_architecture:
        return assumed_architecture
    if device.type != "cuda":
        return "sm_80"
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


@functools.cache
def _table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def entries(kernel: str, arch: str) -> list[dict[str, Any]]:
    """All of a kernel's entries for an architecture, each {"max": bounds, **meta-parameters}."""
    return _table()[kernel][arch]


def meta_parameters(kernel: str, arch: str, **shape: int) -> dict[str, int]:
    """Return the meta-parameters of the first entry that fits the shape."""
    for entry in entries(kernel, arch):
        if all(shape[name] <= bound for name, bound in entry["max"].items()):
            return {name: value for name, value in entry.items() if name != "max"}
    raise KeyError(f"{TABLE.name}: no entry of {kernel} for {arch} fits {shape}")


def in_order(case: TuningCase, arch: str) -> list[dict[str, int]]:
    """Return a case's candidates: the table's own first, the others in a fixed random order, so
    that the first few are spread over all.
    """
    others = list(case.candidates)
    random.Random(0).shuffle(others)
    own = [
        {name: value for name, value in entry.items() if name != "max"}
        for entry in entries(case.kernel, arch)
        if entry["max"] == case.bounds
    ]
    return [*(one for one in own if one in others), *(one for one in others if one not in own)]


def measure(
    case: TuningCase, arch: str, deadline: float = math.inf
) -> list[tuple[float, dict[str, int]]]:
    """Return (milliseconds, candidate), fastest first, without candidates that exceed the GPU's
    resources. After `deadline` (time.monotonic) no further one is begun.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: list[tuple[float, dict[str, int]]] = []
    for candidate in in_order(case, arch):
        if times and time.monotonic() > deadline:
            break
        try:
            times.append(
                (do_bench(functools.partial(case.run, candidate), return_mode="median"), candidate)
            )
        except OutOfResources as reason:
            print(f"  {candidate}: {' '.join(str(reason).split())}")
    return sorted(times, key=lambda row: row[0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dad_fast.kernels.tuning",
        description="times the Triton kernels' meta-parameters",
    )
    parser.add_argument(
        "kernels", nargs="*", help="kernels of the table; default: all that have cases"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="time for all; default: every candidate"
    )
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=TABLE,
        metavar="FILE",
        help=f"write the table with the fastest; default: into {TABLE.name}",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "tuning: torch sees no CUDA device here; run it on the GPU whose entries are to be measured",
            file=sys.stderr,
        )
        return 3
    arch, table = architecture("cuda"), _table()
    modules = [importlib.import_module(name) for name in (*triton_modules(), *CHOOSERS)]
    cases = [
        case
        for module in modules
        if hasattr(module, "tuning_cases")
        for case in module.tuning_cases()
    ]
    unknown = set(options.kernels) - {case.kernel for case in cases}
    if unknown:
        print(
            f"tuning: no such kernel: {', '.join(sorted(unknown))}; there are {', '.join(sorted({c.kernel for c in cases}))}",
            file=sys.stderr,
        )
        return 2
    if options.kernels:
        cases = [case for case in cases if case.kernel in options.kernels]
    measured: dict[str, list[dict[str, Any]]] = {}
    start = time.monotonic()
    for number, case in enumerate(cases, start=1):
        print(
            f"{case.kernel} on {torch.cuda.get_device_name()}, up to {case.bounds or 'any shape'}"
        )
        times = measure(case, arch, start + options.seconds * number / len(cases))
        for milliseconds, candidate in times:
            print(f"  {milliseconds:9.4f} ms  {candidate}")
        if times:
            measured.setdefault(case.kernel, []).append({"max": case.bounds} | times[0][1])
        else:
            print("  no candidate ran; the table keeps its entries for this kernel")
            return 1
        is_last = case.kernel not in {later.kernel for later in cases[number:]}
        if options.write and is_last:
            table[case.kernel][arch] = measured[case.kernel]
            options.write.write_text(render(table), encoding="utf-8")
            print(f"written: {options.write} ({arch}: {case.kernel})")
    return 0


def render(table: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Format the table as JSON with an entry a line, for readable diffs."""
    kernels = []
    for kernel, by_arch in table.items():
        archs = []
        for arch, rows in by_arch.items():
            lines = ",\n".join(f"      {json.dumps(row)}" for row in rows)
            archs.append(f'    "{arch}": [\n{lines}\n    ]')
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(archs) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
