"""SIGTERM, SIGUSR1 and Ctrl-C as requests that are answered at the next boundary between two pieces of work."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def stop_requests(pass_on: Callable[[int], None] | None = None) -> Iterator[StopRequest]:
    """Handlers for the length of the block; outside the main thread there are none to install. `pass_on` gets every signal too."""
    request = StopRequest(pass_on)
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            previous[number] = signal.signal(number, request._handle)
    except ValueError:
        pass
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
