"""Time of training: of the whole run, and the share of a log window in which the device waited for
data.

On a GPU the host only queues work, so the host's time around `next(batch)` is meaningless. Events
on the device's queue mark the start and the end of each step; the time between two steps is the
wait. On a CPU the host's time is exact.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from dad_fast.cores import usable_cores

# Share of waiting from which a run is input-bound.
INPUT_BOUND = 0.1


class Window(NamedTuple):
    """Steps since the last log line, their wall seconds, and the seconds of these without a
    step.
    """

    steps: int
    seconds: float
    waited: float


class StepTimer:
    """Wall time of training alone.

    Put `with step():` around each step; `count` and `skip` exclude all other time. Runs that share
    their batches share `total`: each of `shared_by` runs counts an equal part.
    """

    def __init__(self, device: torch.device, total: float = 0.0) -> None:
        self.total = total
        self.shared_by = 1
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._steps = 0
        self._window = self._busy = 0.0
        self._mark = time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step, from the moment its batch is there."""
        self._steps += 1
        if self._device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            start_time = time.perf_counter()
            yield
            self._busy += time.perf_counter() - start_time

    def count(self) -> None:
        """Count the time until now."""
        now = time.perf_counter()
        self.total = self.total + (now - self._mark) / self.shared_by
        self._window = self._window + now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Exclude the time since the last `count`: validation, checkpoints and measurements are not
        training.
        """
        self._mark = time.perf_counter()

    def window(self) -> Window:
        """Return the counts since the last call.

        On a GPU, call it when the device has finished its steps: after reading a value.
        """
        busy = self._busy + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        found = Window(self._steps, self._window, max(0.0, self._window - busy))
        self._events = []
        self._steps = 0
        self._window = self._busy = 0.0
        return found


def input_bound(
    window: Window, images_per_step: int, workers: int, loader: str, cuda: bool
) -> str | None:
    """Return a message for a run that waits for its data, with both rates and a fix; None if it
    does not wait.

    On a CPU the loader and the step share the cores: without an idle core more workers cannot help.
    """
    if not window.steps or window.waited < INPUT_BOUND * window.seconds:
        return None
    images = window.steps * images_per_step
    delivered = images / window.seconds
    possible = images / max(window.seconds - window.waited, 1e-9)
    cores = usable_cores()
    idle = cores if cuda else cores - torch.get_num_threads()
    if workers < idle:
        fix = f"raise --workers (now {workers}; {cores} cores)"
    elif not cuda and not workers:
        return None
    elif cuda and loader != "dali":
        fix = "--loader dali decodes on the GPU; smaller files would help too"
    else:
        fix = "smaller files or more cores would help"
    rates = f"{delivered:,.0f} < {possible:,.0f} img/s, the rate of the steps alone"
    return f"input-bound: {rates}; {fix}"
