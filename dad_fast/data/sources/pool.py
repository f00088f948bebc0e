"""Threads and a progress bar for work on many files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from dad_fast.cores import usable_cores
from dad_fast.data.sources.names import shown


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """Pool with a thread per core, at most 32. Leaving the block cancels tasks not yet begun."""
    pool = ThreadPoolExecutor(min(32, usable_cores()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def progress_bar(total: int, text: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, nothing elsewhere; yields a function that advances it."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(shown(text), total=total)
        yield lambda count: progress.advance(task, count)
