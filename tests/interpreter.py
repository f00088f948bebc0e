"""Tests of Triton kernels run in a process of their own: the interpreter is chosen when triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(file: str, *options: str) -> None:
    """Run a test file under Triton's interpreter; fails with what pytest printed. Skips where this Triton's cannot run."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that process")
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4, not {numpy.__version__}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", file, *options]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
