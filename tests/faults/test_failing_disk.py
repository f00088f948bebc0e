"""Every command that writes, on a disk that fails at any of the command's file operations.

The command prints one line with the file and the fix, exits with code 4, leaves no temporary file
and loses no earlier file. The operations are those of failing_disk.c: open, write, sync, rename,
link, make and remove. One operation fails with EIO; or it and all later ones with ENOSPC, except
remove and rename; or writes are short, which must change nothing. By default one operation each of
four commands, drawn from a seed; with `-m slow` all operations of all commands, at most 200.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from failing_disk import needed
from harness import ROOT

SMALL = [
    "data.batch_size=50",
    "data.workers=0",
    "log_every=2",
    "eval.every_epochs=0",
    "eval.suites=[]",
    "variants={}",
    "device=cpu",
    "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
    "schedule.epochs=1",
    "max_steps=2",
    "data.train_split=val",
    "checkpoint.every_steps=1",
]
SETS = [part for item in SMALL for part in ("--set", item)]
SEED = 0
COMMANDS = ("train", "precompute", "eval", "report", "export", "sheet", "merge")
# A store's .part files may stay: the next start resumes from them.
TEMPORARY = (".tmp", ".old")


class Machine:
    """Process with the failing disk below it, and the outputs of successful commands."""

    def __init__(self, root: Path) -> None:
        self.out, self.made, self.log = root / "out", root / "made", root / "operations.log"
        environment = os.environ | {
            "LD_PRELOAD": str(needed()),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        line = [sys.executable, str(Path(__file__).with_name("with_failing_disk.py"))]
        self.process = subprocess.Popen(
            line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.straight: dict[str, dict[str, Any]] = {}

    def command_line(self, command: str) -> list[str]:
        out = self.out
        run = str(self.made / "train" / "run")
        store = str(self.made / "precompute" / "store")
        outputs = [
            "--json",
            str(out / "r.json"),
            "--csv",
            str(out / "r.csv"),
            "--save-predictions",
            str(out / "p"),
        ]
        return {
            "train": ["train", "--preset", "demo", "--method", "kd", *SETS, "-o", str(out / "run")],
            "precompute": [
                *shlex.split("precompute --preset demo --images raw --block-size 250"),
                *SETS,
                "-o",
                str(out / "store"),
            ],
            "eval": ["eval", run, *shlex.split("--suite val -b 100 -j 0 --device cpu"), *outputs],
            "report": ["report", run, "-o", str(out / "page.html")],
            "export": ["export", run, "--overwrite", "-o", str(out / "e")],
            "sheet": ["store", "sheet", store, "-o", str(out / "sheet.png")],
            "merge": ["store", "merge", store, "-o", str(out / "store")],
        }[command]

    def run(
        self, command: str, at: int = 0, how: str | int = 0, on: bool = False
    ) -> dict[str, Any]:
        """Run `command`. Commands that replace an earlier result start with one in place."""
        earlier = self.made / command
        replaces = command not in ("train", "precompute", "merge")
        source = str(earlier) if earlier.exists() and replaces else ""
        case = {
            "arguments": self.command_line(command),
            "folder": str(self.out),
            "source": source,
            "log": str(self.log),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        print(
            json.dumps({**case, "at": at, "how": how, "on": on}),
            file=self.process.stdin,
            flush=True,
        )
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def go_straight(self, command: str) -> dict[str, Any]:
        """Run `command` without failures, once, and keep its output in `made`."""
        inputs = {"train": (), "precompute": (), "sheet": ("precompute",), "merge": ("precompute",)}
        for earlier in inputs.get(command, ("train",)):
            self.go_straight(earlier)
        if command not in self.straight:
            found = self.straight[command] = self.run(command)
            assert found["code"] == 0 and found["operations"], found
            self.made.mkdir(exist_ok=True)
            self.out.rename(self.made / command)
        return self.straight[command]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    one = Machine(tmp_path_factory.mktemp("machine"))
    yield one
    one.process.kill()
    one.process.wait()


def check(found: dict[str, Any], straight: dict[str, Any], about: str) -> None:
    about = f"{about}, {found['failed']}: exit code {found['code']}, {found['stderr'][-3:]}"
    assert not any("Traceback" in line for line in found["stderr"]), about
    removing = found["failed"].startswith(("unlink", "rmdir"))
    left = [
        name
        for name in found["after"]
        if name.endswith(TEMPORARY) or "/.tmp" in name or ".old/" in name
    ]
    assert removing or not left, f"{left}: {about}"
    lost = [name for name in found["before"] if name not in found["after"]]
    assert not lost, f"{lost}: {about}"
    if found["code"] == 0:
        # The failed operation was not needed, such as making a folder that exists.
        assert removing or found["after"].keys() == straight["after"].keys(), about
        return
    last = found["stderr"][-1]
    assert found["code"] == 4 and last.startswith("dad-fast: error: /"), about
    assert "again" in last or "go on" in last or "resume" in last, about
    assert sum(line.startswith("dad-fast:") for line in found["stderr"]) == 1, about


def fail(machine: Machine, command: str, num: int) -> None:
    straight = machine.go_straight(command)
    draw = random.Random(f"{SEED} {command}")
    points = range(1, straight["operations"] + 1)
    for how, on in ((errno.EIO, False), (errno.ENOSPC, True)):
        for at in sorted(draw.sample(points, min(num, len(points)))):
            about = f"{command}, {os.strerror(how)} at operation {at}"
            check(machine.run(command, at, how, on), straight, about)
    short = machine.run(command, 1, "short", True)
    assert short["code"] == 0 and short["after"].keys() == straight["after"].keys(), short


@pytest.mark.parametrize("command", ["train", "eval", "report", "export"])
def test_one_failed_disk_operation_is_one_line(machine: Machine, command: str) -> None:
    fail(machine, command, 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", COMMANDS)
def test_any_failed_disk_operation_is_one_line(machine: Machine, command: str) -> None:
    fail(machine, command, 200)
