"""Report the resources of every Triton kernel and csrc/*.cu on A100 and H100/H200, without a GPU.

    python -m dad_fast.kernels.report

Compiles each for sm_80 and sm_90 (csrc: sm_90a) with the meta-parameters it is launched with, and
prints registers per thread, spills (bytes of stack), shared memory per block, tensor-core
instructions in the machine code, and the occupancy they allow. Exit code 0; 1 when a kernel does
not compile; 3 when a tool is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels.cross_compile import (
    ARCHITECTURES,
    Binary,
    all_specs,
    cuda_binaries,
    cuda_sources,
    triton_binary,
)


def collect(archs: list[str], only: str, name: str) -> tuple[list[Binary], list[str]]:
    """Return the binaries whose name contains `name`, and a line per kernel that does not compile."""
    binaries: list[Binary] = []
    failures: list[str] = []

    def attempt(label: str, function: Any, *arguments: Any) -> None:
        try:
            found = function(*arguments)
        except EnvironmentProblem:
            raise
        except Exception as error:  # whatever it is, the others are still worth a row
            failures.append(
                f"{label}: {(str(error).strip().splitlines() or [type(error).__name__])[-1]}"
            )
        else:
            binaries.extend(found if isinstance(found, list) else [found])

    for arch in archs:
        if only != "cuda":
            for spec in all_specs(arch):
                if name in spec.name:
                    attempt(f"{spec.name} for {arch}", triton_binary, spec, arch)
        if only != "triton":
            for source in cuda_sources():
                if name in source.name:
                    attempt(f"{source.name} for {arch}", cuda_binaries, source, arch)
    return binaries, failures


def table(binaries: list[Binary]) -> str:
    """One row a binary."""
    rows = [
        (
            "kernel",
            "arch",
            "warps",
            "stages",
            "registers",
            "spills",
            "shared",
            "tensor cores",
            "instructions",
            "occupancy",
        )
    ]
    for b in binaries:
        cores = (
            " ".join(
                f"{name}:{count}" for name, count in sorted(b.tensor_core_instructions.items())
            )
            or "-"
        )
        rows.append(
            (
                b.name,
                b.arch,
                str(b.options.get("num_warps", "-")),
                str(b.options.get("num_stages", "-")),
                str(b.registers),
                f"{b.stack} B" if b.spills else "0",
                f"{b.shared} B",
                cores + (" (expected)" if b.tensor_cores_expected and cores == "-" else ""),
                str(b.instructions),
                "-" if b.occupancy is None else f"{b.occupancy:.0%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def as_json(binaries: list[Binary], failures: list[str]) -> str:
    import torch
    import triton

    kernels = [dataclasses.asdict(b) | {"spills": b.spills} for b in binaries]
    return json.dumps(
        {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "kernels": kernels,
            "failures": failures,
        },
        indent=1,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dad_fast.kernels.report",
        description=__doc__.partition("\n")[0].partition(": ")[2],
    )
    parser.add_argument("name", nargs="?", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--arch", action="append", choices=ARCHITECTURES, help="may be given twice; default: all"
    )
    parser.add_argument(
        "--only",
        choices=("triton", "cuda"),
        default="",
        help="only Triton kernels, or only csrc/*.cu",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with the meta-parameters of every row"
    )
    options = parser.parse_args(arguments)
    try:
        binaries, failures = collect(
            options.arch or list(ARCHITECTURES), options.only, options.name
        )
    except (EnvironmentProblem, ImportError) as problem:
        print(f"report: {problem}", file=sys.stderr)
        return 3
    print(as_json(binaries, failures) if options.json else table(binaries))
    for line in failures:
        print(f"report: {line}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
