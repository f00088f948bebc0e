"""SIGTERM, SIGUSR1 and Ctrl-C as requests that are answered at the next boundary between two pieces of work."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dad_fast.errors import DadFastError, Interrupted, Preempted


class StopRequest:
    """What has been asked for so far; `error` is None, Preempted (exit 75) or Interrupted (exit 130)."""

    def __init__(self, pass_on: Callable[[int], None] | None = None) -> None:
        self.error: type[DadFastError] | None = None
        self._pass_on = pass_on

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._pass_on is not None:
            self._pass_on(number)
        if number == signal.SIGINT and self.error is Interrupted:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self.error = Interrupted if number == signal.SIGINT else Preempted


_active: StopRequest | None = None


def asked() -> type[DadFastError] | None:
    """What the innermost `stop_requests` block around has been asked for."""
    return _active.error if _active is not None else None


@contextmanager
def stop_requests(pass_on: Callable[[int], None] | None = None) -> Iterator[StopRequest]:
    """Handlers for the length of the block; outside the main thread there are none to install. `pass_on` gets every signal too.

    A block inside another one shares its request.
    """
    global _active
    if _active is not None:
        yield _active
        return
    request = _active = StopRequest(pass_on)
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            previous[number] = signal.signal(number, request._handle)
    except ValueError:
        pass
    try:
        yield request
    finally:
        _active = None
        for number, handler in previous.items():
            signal.signal(number, handler)


def stoppable(show: Callable[[int, int], None], output: Path) -> Callable[[int, int], None]:
    """`show`, a progress callback, which raises what a signal has asked for."""

    def polled(done: int, total: int) -> None:
        show(done, total)
        if stop := asked():
            raise stop(f"stopped while judging; the weights are saved in {output}, go on with --resume auto")

    return polled
