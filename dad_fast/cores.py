"""CPU cores and memory that this process may use. Imports nothing heavy."""

from __future__ import annotations

import os

SIDE_BY_SIDE = (
    "DAD_FAST_SIDE_BY_SIDE"  # set by a sweep for its workers: how many of them share the machine
)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float:
    """Memory of the machine in GiB; 8 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return 8.0


def side_by_side() -> int:
    """Number of runs that share this machine, as far as this project started them."""
    text = os.environ.get(SIDE_BY_SIDE, "1")
    return int(text) if text.isdecimal() and int(text) else 1


def usable_cores() -> int:
    """This process's share of the cores, at least 1."""
    return max(1, num_cores() // side_by_side())


def wait_passively() -> None:
    """Let OpenMP threads sleep while they wait, unless the user has chosen. Call it before torch is imported.

    Threads that spin while they wait take the cores from the threads they wait for, when other work runs beside them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
