"""Disk that fails at a chosen operation: failing_disk.c, compiled, and its environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")


@lru_cache(maxsize=1)
def library() -> Path | None:
    """Return the library for LD_PRELOAD, deleted at exit; None without Linux or a compiler."""
    import atexit
    import tempfile

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        return None
    folder = tempfile.mkdtemp(prefix="dad-fast-disk-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = Path(folder) / "failing_disk.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(SOURCE), "-ldl"], check=True
    )
    return made


def needed() -> Path:
    """Return the library, or skip the test."""
    found = library()
    if found is None:
        pytest.skip("needs Linux and a C compiler")
    return found


def watching(
    folder: Path, log: Path, at: int = 0, how: str | int = 0, on: bool = False
) -> dict[str, str]:
    """Return the environment that logs operations below `folder` and lets operation `at` fail, with
    `on` all later ones, too.

    how: an errno, "short" or "kill".
    """
    chosen = {
        "DISK_FOLDER": str(folder),
        "DISK_LOG": str(log),
        "DISK_AT": str(at),
        "DISK_HOW": str(how),
    }
    return chosen | ({"DISK_FROM": "1"} if on else {})


def operations(log: Path) -> list[str]:
    """Return the operations in their order, such as "rename /…/results.json"."""
    return [line.partition(" ")[2] for line in log.read_text().splitlines()] if log.exists() else []
