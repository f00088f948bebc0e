"""Kills a command of dad-fast (-9) at random moments, starts it again until it ends, and compares with the run that nobody killed.

A kill falls at a random time, as a share of what the straight run took here, start-up included; or, every other one and where
failing_disk.c can be compiled, just before a random one of the operations on files that the straight run makes: those moments are short,
and they are the ones that matter. Both are drawn from a seed and recorded.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from failing_disk import library, operations, watching

from tests import warm
from tests.processes import HANG

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """arguments: the command line that works into a folder, and goes on with what is there. contents: what must be equal in the end.
    whole: raises AssertionError where a reader would find something torn; called after every kill."""

    name: str
    arguments: Callable[[Path], list[str]]
    contents: Callable[[Path], dict[str, Any]]
    whole: Callable[[Path], None] = lambda folder: None
    rewrites: bool = False  # the next one, over what the last one wrote


@dataclass
class Cycles:
    """What the cycles of one job came to. moments: when each kill came."""

    job: str
    seed: int
    kills: int = 0
    ended_before_the_kill: int = 0
    comparisons: int = 0  # each of a folder in which one was killed until it ended
    files_compared: int = 0
    straight_seconds: float = 0.0
    straight_operations: int = 0
    seconds: float = 0.0  # of everything
    moments: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def start(
    arguments: list[str], LD_PRELOAD: str = "", cold: bool = False, **environment: str
) -> Any:
    """A process, as subprocess.Popen has it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "dad_fast", *arguments]
    if cold:
        env |= {"LD_PRELOAD": LD_PRELOAD} if LD_PRELOAD else {}
        return subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    return warm.start(command, env=env, preload=LD_PRELOAD)


def run_to_the_end(arguments: list[str], cold: bool = False, **environment: str) -> float:
    """Seconds."""
    begin = time.monotonic()
    process = start(arguments, cold=cold, **environment)
    said = process.communicate(timeout=HANG)[1]
    assert process.returncode == 0, said
    return time.monotonic() - begin


def shim() -> dict[str, str]:
    return {"LD_PRELOAD": str(library())} if library() else {}


def kill_cycles(job: Job, root: Path, num_kills: int, seed: int) -> Cycles:
    """Until `num_kills` processes were killed and what they left was finished; AssertionError where anything differs."""
    begin, straight, log = time.monotonic(), root / "straight", root / "operations.log"
    # Nothing else starts report and export as Python starts them; they are short.
    straight_seconds = run_to_the_end(
        job.arguments(straight), cold=job.rewrites, **shim(), **watching(straight, log)
    )
    found = Cycles(job.name, seed, straight_seconds=straight_seconds)
    found.straight_operations = len(operations(log))
    expected = job.contents(straight)
    draw = random.Random(seed)
    while found.kills < num_kills:
        folder = root / f"killed-{0 if job.rewrites else found.comparisons}"
        code = -signal.SIGKILL
        while code != 0:
            share, operation = draw.random(), draw.randint(1, max(1, found.straight_operations))
            by_operation = (
                found.straight_operations > 0
                and (found.kills + found.ended_before_the_kill) % 2 == 1
            )
            if found.kills >= num_kills:  # let it end
                share, operation, by_operation = 0.0, 0, False
            log.unlink(missing_ok=True)
            at = operation if by_operation else 0
            started = time.monotonic()
            seconds = 0.0 if by_operation else share * found.straight_seconds
            code = _start_and_kill(
                job.arguments(folder), seconds, **shim(), **watching(folder, log, at, "kill")
            )
            job.whole(folder)
            if code:
                found.kills += 1
                last = operations(log)[-1].replace(str(folder), "") if by_operation else ""
                found.moments.append(
                    f"before operation {at}, {last}"
                    if by_operation
                    else f"at {share:.3f} of the time"
                )
            elif found.kills < num_kills:
                found.ended_before_the_kill += 1
                if not by_operation:  # the straight run had a busier machine
                    found.straight_seconds = min(found.straight_seconds, time.monotonic() - started)
        there = job.contents(folder)
        differ = [
            name
            for name in sorted(there.keys() | expected.keys())
            if there.get(name) != expected.get(name)
        ]
        assert not differ, (
            f"{job.name}: {differ} of {folder} and {straight} differ; seed {seed}, killed {found.moments}"
        )
        found.comparisons += 1
        found.files_compared += len(expected)
    found.seconds = round(time.monotonic() - begin, 1)
    return found


def _start_and_kill(arguments: list[str], seconds: float, **environment: str) -> int:
    """Exit code: -9, or 0 where it had ended before. Not killed from here where `seconds` is 0."""
    process = start(arguments, **environment)
    try:
        said = process.communicate(timeout=seconds or HANG)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), f"exit code {process.returncode}: {said}"
    return process.returncode
