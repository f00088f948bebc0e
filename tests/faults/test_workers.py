"""Loader processes that die or hang under a command: one line, exit code 1, no process left. (Loaders alone: tests/data/test_loader.py.)"""

from __future__ import annotations

import importlib.util
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
DIES, HANGS = ("SIGKILL", "a loader worker died"), ("SIGSTOP", "a loader worker hangs")
SMALL = [
    "--set",
    "eval.suites=[]",
    "--set",
    "variants={}",
    "--set",
    "checkpoint.every_steps=1",
    "-b",
    "50",
    "--device",
    "cpu",
]
COMMANDS = {
    "train": ["train", "--preset", "demo", "--method", "ce", *SMALL],
    "train, DALI": [
        "train",
        "--method",
        "ce",
        *STUDENT,
        "--loader",
        "dali",
        "--device",
        "cpu",
        "-b",
        "8",
        "--epochs",
        "9",
    ],
    "precompute": ["precompute", "--preset", "demo", *SMALL],
    "eval": [
        "eval",
        "--teacher",
        "embedded:digits",
        "--data-dir",
        "embedded:digits",
        "--suite",
        "train",
        "-b",
        "10",
        "--device",
        "cpu",
    ],
}


@pytest.mark.parametrize(
    ("verb", "fault"),
    [
        ("train", DIES),
        *(
            pytest.param(verb, fault, marks=pytest.mark.slow)
            for verb in COMMANDS
            for fault in (DIES, HANGS)
        ),
    ],
)
def test_a_worker_that_dies_or_hangs(tmp_path: Path, verb: str, fault: tuple[str, str]) -> None:
    arguments = [*COMMANDS[verb], "-j", "2"]
    if "DALI" in verb:
        if importlib.util.find_spec("nvidia.dali") is None:
            pytest.skip("needs DALI")
        arguments += ["--data-dir", str(write_images(tmp_path / "data"))]
    if verb != "eval":
        arguments += ["-o", str(tmp_path / "out")]
    done = warm.run([sys.executable, "-c", SCRIPT, fault[0], *arguments], cwd=ROOT, timeout=HANG)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert fault[1] in done.stderr.splitlines()[-1] and "left: []" in done.stdout, (
        done.stderr,
        done.stdout,
    )
