"""Kills a command of dad-fast (-9) at random moments, starts it again until it ends, and compares with the run that nobody killed.

The moments are drawn from a seed, as shares of the time that the straight run took here; so a record says which they were, and on
another machine they fall on the same shares.
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

ROOT = Path(__file__).resolve().parents[2]
EARLIEST = 0.5  # of the straight run: before that Python is still importing


@dataclass(frozen=True)
class Job:
    """arguments: the command line that works into a folder, and goes on with what is there. contents: what must be equal in the end.
    whole: raises AssertionError where a reader would find something torn; called after every kill."""

    name: str
    arguments: Callable[[Path], list[str]]
    contents: Callable[[Path], dict[str, Any]]
    whole: Callable[[Path], None] = lambda folder: None


@dataclass
class Cycles:
    """What the cycles of one job came to."""

    job: str
    seed: int
    kills: int = 0
    ended_before_the_kill: int = 0
    folders: int = 0  # each killed until it ended, then compared
    straight_seconds: float = 0.0
    shares: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dad_fast", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_to_the_end(arguments: list[str]) -> float:
    """Seconds."""
    begin = time.monotonic()
    process = start(arguments)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return time.monotonic() - begin


def kill_cycles(job: Job, root: Path, num_kills: int, seed: int) -> Cycles:
    """Until `num_kills` processes were killed and what they left was finished; AssertionError where anything differs."""
    straight = root / "straight"
    found = Cycles(job.name, seed, straight_seconds=run_to_the_end(job.arguments(straight)))
    expected = job.contents(straight)
    draw = random.Random(seed)
    while found.kills < num_kills:
        folder = root / f"killed-{found.folders}"
        code = -signal.SIGKILL
        while code != 0:
            share = draw.uniform(EARLIEST, 1.0) if found.kills < num_kills else 0.0  # 0: let it end
            begin = time.monotonic()
            code = _start_and_kill(job.arguments(folder), share * found.straight_seconds)
            job.whole(folder)
            if code:
                found.kills += 1
                found.shares.append(round(share, 4))
            elif share:
                found.ended_before_the_kill += 1
                found.straight_seconds = min(found.straight_seconds, time.monotonic() - begin)  # the straight run had a busier machine
        assert job.contents(folder) == expected, f"{job.name}: killed at {found.shares} of {found.straight_seconds:.1f} s, seed {seed}"
        found.folders += 1
    return found


def _start_and_kill(arguments: list[str], seconds: float) -> int:
    """Exit code: -9, or 0 where it had ended before. Not killed where `seconds` is 0."""
    process = start(arguments)
    try:
        said = process.communicate(timeout=seconds or 300)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), f"exit code {process.returncode}: {said}"
    return process.returncode
