"""Loader processes that die or hang: one line, exit code 1, and no process left.

tests/data/test_loader.py tests loaders alone.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

for package in ("torch", "timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from harness import HANG, ROOT
from tiny import STUDENT, write_images

from tests import warm

SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
from dad_fast.cli.main import main
from dad_fast.data.loaders import workers

workers.CHECK_SECONDS = 1.0
if sys.argv[1] == "SIGSTOP":
    workers.HANG_SECONDS = 3.0

def strike():
    while not (found := multiprocessing.active_children()):
        time.sleep(0.01)
    os.kill(found[0].pid, getattr(signal, sys.argv[1]))

threading.Thread(target=strike, daemon=True).start()
code = main(sys.argv[2:])
print("left:", [one.pid for one in multiprocessing.active_children()])
sys.exit(code)
"""
DIES = ("SIGKILL", "a loader worker died")
HANGS = ("SIGSTOP", "a loader worker hangs")
SMALL = [
    *shlex.split("--set eval.suites=[] --set variants={} --set checkpoint.every_steps=1"),
    *shlex.split("-b 50 --device cpu"),
]
COMMANDS = {
    "train": ["train", "--preset", "demo", "--method", "ce", *SMALL],
    "train, DALI": [
        *shlex.split("train --method ce"),
        *STUDENT,
        *shlex.split("--loader dali --device cpu -b 8 --epochs 9"),
    ],
    "precompute": ["precompute", "--preset", "demo", *SMALL],
    "eval": [
        *shlex.split("eval --teacher embedded:digits --data-dir embedded:digits --suite train"),
        *shlex.split("-b 10 --device cpu"),
    ],
}


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("train", DIES),
        *(
            pytest.param(command, fault, marks=pytest.mark.slow)
            for command in COMMANDS
            for fault in (DIES, HANGS)
        ),
    ],
)
def test_worker_that_dies_or_hangs_ends_the_command(
    tmp_path: Path, command: str, fault: tuple[str, str]
) -> None:
    arguments = [*COMMANDS[command], "-j", "2"]
    if "DALI" in command:
        if importlib.util.find_spec("nvidia.dali") is None:
            pytest.skip("needs DALI")
        arguments += ["--data-dir", str(write_images(tmp_path / "data"))]
    if command != "eval":
        arguments += ["-o", str(tmp_path / "out")]
    done = warm.run([sys.executable, "-c", SCRIPT, fault[0], *arguments], cwd=ROOT, timeout=HANG)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert fault[1] in done.stderr.splitlines()[-1], done.stderr
    assert "left: []" in done.stdout, done.stdout
