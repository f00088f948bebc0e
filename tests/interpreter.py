"""Tests of Triton kernels under the interpreter, which triton chooses when it is imported."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(*files: str) -> None:
    """Run the tests marked `interpreter` in `files` in a new process, or skip if it cannot run."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    numpy_version = tuple(map(int, numpy.__version__.split(".")[:2]))
    if triton.__version__.startswith("3.6.") and numpy_version >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4, "
            f"not {numpy.__version__}"
        )
    command = [
        sys.executable,
        *shlex.split("-m pytest -v -p no:xdist -p no:cacheprovider -m interpreter"),
        *files,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = [line for line in done.stdout.splitlines() if " PASSED" in line]
    for file in files:
        assert any(f"{Path(file).name}::" in line for line in passed), f"no test of {file} ran"
