"""Find and load the compiled half (csrc/), or report why it is off.

An installed package (editable or not) has the library in its own folder; in a bare checkout `make
csrc` builds it there.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import dad_fast


@functools.cache
def _load(name: str, built_by: str) -> tuple[Any, str]:
    """Load the tvm-ffi module lib<name>; return it (or None) with a line of status."""
    found = [
        path for folder in dad_fast.__path__ for path in sorted(Path(folder).glob(f"lib{name}.*"))
    ]
    if not found:
        return (
            None,
            f"off: not built ({built_by} is needed when installing; in a checkout: make csrc)",
        )
    try:
        import tvm_ffi
    except ImportError as error:
        return None, f"off: {error} (pip install apache-tvm-ffi)"
    try:
        module = tvm_ffi.load_module(str(found[0]))
        return (
            module,
            f"on: {found[0]} ({getattr(module, 'instruction_sets' if name == 'dad_csrc' else 'architectures')().split()[0]})",
        )
    except Exception as error:  # whatever is wrong with the file, torch takes its place
        return (
            None,
            f"off: {found[0]} does not load: {' '.join(str(error).split())} (install the project again)",
        )


def csrc() -> Any | None:
    """Return the loaded library, a module with one function per op; None if it is not available."""
    return _load("dad_csrc", "a C++17 compiler")[0]


def csrc_status() -> str:
    """Return `on: FILE (instruction set)` or `off: REASON (FIX)`."""
    return _load("dad_csrc", "a C++17 compiler")[1]


def csrc_cuda() -> Any | None:
    """Return the library of the CUDA half, which is built if nvcc is found; else None."""
    return _load("dad_csrc_cuda", "nvcc, of CUDA's toolkit,")[0]


def csrc_cuda_status() -> str:
    """Return `on: FILE (architectures)` or `off: REASON (FIX)`."""
    return _load("dad_csrc_cuda", "nvcc, of CUDA's toolkit,")[1]
