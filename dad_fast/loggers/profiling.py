"""Named ranges around the stages of a step, for Nsight (NVTX) and torch's profiler.

    with stage("teacher"): ...

Off, and free, unless a profile is taken. Names: step, data, mix, attack, encode, lookup, decode,
teacher, student, objective, backward, update; with several processes, reduce; where the step
replays CUDA graphs, learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

Range = Callable[[str], AbstractContextManager[None]]

_OFF: AbstractContextManager[None] = nullcontext()
_active: Range | None = None


def stage(name: str) -> AbstractContextManager[None]:
    """Return a range of that name inside `naming_stages()`, else a shared no-op."""
    return _active(name) if _active else _OFF


@contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """Range of torch's profiler, and of NVTX on a GPU."""
    if torch.cuda.is_available():
        with torch.profiler.record_function(name), torch.cuda.nvtx.range(name):
            yield
    else:
        with torch.profiler.record_function(name):
            yield


@contextmanager
def naming_stages(make: Range = profiler_range) -> Iterator[None]:
    """Turn the ranges on; `make` makes one of a name."""
    global _active
    before = _active
    _active = make
    try:
        yield
    finally:
        _active = before


def name_method(owner: Any, method: str, name: str) -> None:
    """Put a range around a method of one object, for components without stages of their own."""
    original: Callable[..., Any] = getattr(owner, method)

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with stage(name):
            return original(*args, **kwargs)

    setattr(owner, method, ranged)


@contextmanager
def cuda_profiler_range(device: torch.device) -> Iterator[None]:
    """Mark the range that nsys and ncu record; does nothing on a CPU.

    For `nsys --capture-range=cudaProfilerApi` and `ncu --profile-from-start off`.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize(device)
    finally:
        torch.cuda.profiler.stop()
