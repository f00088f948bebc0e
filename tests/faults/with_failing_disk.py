"""Run commands on a failing disk, each in a fork, so that torch is imported once.

Start this script with failing_disk.so.

Each line of stdin is a run: {"arguments": [...], "folder": F, "source": G or "", "log": L, "at": 7,
"how": 5, "on": false}. F becomes a copy of G first. Each line of stdout is its result: exit code,
lines on stderr, the operation that failed, the number of operations, and the files of F before and
after.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import open_clip  # noqa: F401
import timm  # noqa: F401
import torch  # noqa: F401
from failing_disk import operations, watching

from dad_fast.cli.main import main


def files(folder: Path) -> dict[str, str]:
    """Return SHA-256 by name."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def run(case: dict[str, Any]) -> dict[str, Any]:
    folder, log, at = Path(case["folder"]), Path(case["log"]), case["at"]
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    folder.mkdir()
    if case["source"]:
        shutil.copytree(case["source"], folder, dirs_exist_ok=True)
    before = files(folder)
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.environ.update(watching(folder, log, at, case["how"], case["on"]))
            os.dup2(stderr.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(main(case["arguments"]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").splitlines()
    done = operations(log)
    failed = done[at - 1] if 0 < at <= len(done) else ""
    return {
        "code": code,
        "stderr": lines,
        "failed": failed,
        "operations": len(done),
        "before": before,
        "after": files(folder),
    }


if __name__ == "__main__":
    # A copy of stdout, since the commands print, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
