"""CPU cores and memory that this process may use. Imports nothing heavy."""

from __future__ import annotations

import os

# Number of workers that share the machine; a sweep sets it for its workers.
SIDE_BY_SIDE = "DAD_FAST_SIDE_BY_SIDE"


def num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float:
    """Return the machine's memory in GiB; 8 when the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return 8.0


def side_by_side() -> int:
    """Return the number of runs of a sweep that share this machine."""
    text = os.environ.get(SIDE_BY_SIDE, "1")
    return int(text) if text.isdecimal() and int(text) else 1


def usable_cores() -> int:
    """Return this process's share of the cores, at least 1."""
    return max(1, num_cores() // side_by_side())


def wait_passively() -> None:
    """Let OpenMP threads sleep while they wait, unless the user set a policy.

    Call it before torch is imported. Spinning threads take cores from the threads they wait for
    when other work shares the machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
