"""Every verb that writes, on a disk that fails at any of the operations that the verb makes: one line that names the file and the mend,
exit code 4, no temporary file left, and what was there before is there still.

The operations are those of failing_disk.c: opening, writing, syncing, renaming, linking, making and removing. One fails with EIO; or it
and all later ones with ENOSPC, but for removing and renaming; or writes are short, which must change nothing. One moment of four
verbs by default, drawn from a seed; `-m slow`: all moments of all, at most 200.
"""

from __future__ import annotations

import errno
import json
import os
import random
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
TEMPORARY = (".tmp", ".old")  # of a store, .part files stay: the next start goes on with them


class Machine:
    """One process with the failing disk below it, and what commands that did not fail have made: a run, a store, an export."""

    def __init__(self, root: Path) -> None:
        self.out, self.made, self.log = root / "out", root / "made", root / "operations.log"
        environment = os.environ | {
            "LD_PRELOAD": str(needed()),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name("with_failing_disk.py"))]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.straight: dict[str, dict[str, Any]] = {}

    def command(self, verb: str) -> list[str]:
        out, run, store = (
            self.out,
            str(self.made / "train" / "run"),
            str(self.made / "precompute" / "store"),
        )
        judged = [
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
                "precompute",
                "--preset",
                "demo",
                "--images",
                "raw",
                "--block-size",
                "250",
                *SETS,
                "-o",
                str(out / "store"),
            ],
            "eval": [
                "eval",
                run,
                "--suite",
                "val",
                "-b",
                "100",
                "-j",
                "0",
                "--device",
                "cpu",
                *judged,
            ],
            "report": ["report", run, "-o", str(out / "page.html")],
            "export": ["export", run, "--overwrite", "-o", str(out / "e")],
            "sheet": ["store", "sheet", store, "-o", str(out / "sheet.png")],
            "merge": ["store", "merge", store, "-o", str(out / "store")],
        }[verb]

    def run(self, verb: str, at: int = 0, how: str | int = 0, on: bool = False) -> dict[str, Any]:
        """Over what an earlier one wrote, for the verbs that replace it."""
        earlier = self.made / verb
        source = (
            str(earlier)
            if earlier.exists() and verb not in ("train", "precompute", "merge")
            else ""
        )
        case = {
            "arguments": self.command(verb),
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

    def go_straight(self, verb: str) -> dict[str, Any]:
        """Once, kept in `made`."""
        for needed_before in {
            "train": (),
            "precompute": (),
            "sheet": ("precompute",),
            "merge": ("precompute",),
        }.get(verb, ("train",)):
            self.go_straight(needed_before)
        if verb not in self.straight:
            found = self.straight[verb] = self.run(verb)
            assert found["code"] == 0 and found["operations"], found
            self.made.mkdir(exist_ok=True)
            self.out.rename(self.made / verb)
        return self.straight[verb]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    one = Machine(tmp_path_factory.mktemp("machine"))
    yield one
    one.process.kill()
    one.process.wait()


def check(found: dict[str, Any], straight: dict[str, Any], about: str) -> None:
    about = f"{about}, {found['failed']}: exit code {found['code']}, {found['said'][-3:]}"
    assert not any("Traceback" in line for line in found["said"]), about
    removing = found["failed"].startswith(("unlink", "rmdir"))
    left = [
        name
        for name in found["after"]
        if name.endswith(TEMPORARY) or "/.tmp" in name or ".old/" in name
    ]
    assert removing or not left, f"{left}: {about}"
    lost = [name for name in found["before"] if name not in found["after"]]
    assert not lost, f"{lost}: {about}"
    if found["code"] == 0:  # what failed was not needed, such as making a folder that is there
        assert removing or found["after"].keys() == straight["after"].keys(), about
        return
    last = found["said"][-1]
    assert (
        found["code"] == 4
        and last.startswith("dad-fast: error: /")
        and ("again" in last or "go on" in last)
    ), about
    assert sum(line.startswith("dad-fast:") for line in found["said"]) == 1, about


def fail(machine: Machine, verb: str, num: int) -> None:
    straight = machine.go_straight(verb)
    draw, points = random.Random(f"{SEED} {verb}"), range(1, straight["operations"] + 1)
    for how, on in ((errno.EIO, False), (errno.ENOSPC, True)):
        for at in sorted(draw.sample(points, min(num, len(points)))):
            check(
                machine.run(verb, at, how, on),
                straight,
                f"{verb}, {os.strerror(how)} at operation {at}",
            )
    short = machine.run(verb, 1, "short", True)
    assert short["code"] == 0 and short["after"].keys() == straight["after"].keys(), short


@pytest.mark.parametrize("verb", ["train", "eval", "report", "export"])
def test_a_disk_that_fails_at_some_operation(machine: Machine, verb: str) -> None:
    fail(machine, verb, 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_disk_that_fails_at_every_operation(machine: Machine, verb: str) -> None:
    fail(machine, verb, 200)
