"""A bound on the work that hostile input may cause."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

# Seconds of CPU time, first imports included. The inputs of these tests cost milliseconds when
# they are refused, and hours or many GB when they are not, so the bound suits any machine.
CPU_SECONDS = 60.0


@contextlib.contextmanager
def cpu_limit() -> Iterator[None]:
    """Expect the block to use less than CPU_SECONDS in this process."""
    start = time.process_time()
    yield
    assert time.process_time() - start < CPU_SECONDS
