"""Kill cycles: kill a command (-9) at random moments, restart it until it ends, compare the result.

Kills alternate between a random time, as a share of the duration of the uninterrupted run, and the
moment before a random one of that run's file operations (if failing_disk.c can be compiled): these
moments are short, and they are the critical ones. Both are drawn from a seed and recorded.
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
    """Command under test.

    arguments: the command line that writes to a folder, and resumes what is there.
    contents: what must be equal in the end.
    whole: raises AssertionError if a reader would find a torn file; called after every kill.
    rewrites: the next run overwrites the result of the last one.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    contents: Callable[[Path], dict[str, Any]]
    whole: Callable[[Path], None] = lambda folder: None
    rewrites: bool = False


@dataclass
class Cycles:
    """Results of the cycles of one job.

    comparisons: finished folders that were compared with the uninterrupted run.
    seconds: of everything.
    moments: of each kill.
    """

    job: str
    seed: int
    kills: int = 0
    ended_before_the_kill: int = 0
    comparisons: int = 0
    files_compared: int = 0
    straight_seconds: float = 0.0
    straight_operations: int = 0
    seconds: float = 0.0
    moments: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def start(
    arguments: list[str], LD_PRELOAD: str = "", cold: bool = False, **environment: str
) -> Any:
    """Start a process. Returns it, with the methods of subprocess.Popen."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "dad_fast", *arguments]
    if cold:
        env |= {"LD_PRELOAD": LD_PRELOAD} if LD_PRELOAD else {}
        return subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    return warm.start(command, env=env, preload=LD_PRELOAD)


def run_to_the_end(arguments: list[str], cold: bool = False, **environment: str) -> float:
    """Return the seconds that the command took."""
    begin = time.monotonic()
    process = start(arguments, cold=cold, **environment)
    stderr = process.communicate(timeout=HANG)[1]
    assert process.returncode == 0, stderr
    return time.monotonic() - begin


def shim() -> dict[str, str]:
    return {"LD_PRELOAD": str(library())} if library() else {}


def kill_cycles(job: Job, root: Path, num_kills: int, seed: int) -> Cycles:
    """Kill `num_kills` processes and finish their work. AssertionError if a result differs."""
    begin = time.monotonic()
    straight = root / "straight"
    log = root / "operations.log"
    # report and export are short, and no other test starts them with a fresh interpreter.
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
            is_odd = (found.kills + found.ended_before_the_kill) % 2 == 1
            by_operation = is_odd and found.straight_operations > 0
            if found.kills >= num_kills:
                # Let it end.
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
                by_time = f"at {share:.3f} of the time"
                found.moments.append(f"before operation {at}, {last}" if by_operation else by_time)
            elif found.kills < num_kills:
                found.ended_before_the_kill += 1
                if not by_operation:
                    # The uninterrupted run had a busier machine.
                    found.straight_seconds = min(found.straight_seconds, time.monotonic() - started)
        there = job.contents(folder)
        names = sorted(there.keys() | expected.keys())
        differ = [name for name in names if there.get(name) != expected.get(name)]
        about = f"{job.name}: {differ} of {folder} and {straight} differ"
        assert not differ, f"{about}; seed {seed}, killed {found.moments}"
        found.comparisons += 1
        found.files_compared += len(expected)
    found.seconds = round(time.monotonic() - begin, 1)
    return found


def _start_and_kill(arguments: list[str], seconds: float, **environment: str) -> int:
    """Return the exit code: -9, or 0 if the process ended before.

    With `seconds` 0, it is not killed from here.
    """
    process = start(arguments, **environment)
    try:
        stderr = process.communicate(timeout=seconds or HANG)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        stderr = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), f"exit code {process.returncode}: {stderr}"
    return process.returncode
