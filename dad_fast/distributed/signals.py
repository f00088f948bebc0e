"""SIGTERM, SIGUSR1 and Ctrl-C: exit code 75, or 130 for Ctrl-C, whatever is being done.

Where there is nothing to save (`ends_at_once`) a signal ends what is being done, as Ctrl-C ends any Python program: through every
`finally`. Whoever has something to save, or others to agree with, takes it as a request meanwhile (`stop_requests`) and answers at the
next boundary between two pieces of work. The two may lie inside each other; the innermost counts. Imports nothing heavy.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dad_fast.errors import DadFastError, Interrupted, Preempted

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE = 25.0  # seconds for the end where there is nothing to save: then the process is ended from outside its main thread


class StopRequest:
    """What has been asked for so far; `error` is None, Preempted (exit 75) or Interrupted (exit 130, also after a SIGTERM)."""

    def __init__(self) -> None:
        self.error: type[DadFastError] | None = None
        self.at_once = False  # whether there is nothing to save
        self.pass_on: Callable[[int], None] | None = None
        self._ending = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.pass_on is not None:
            self.pass_on(number)
        again = number == signal.SIGINT and self.error is Interrupted
        self.error = _error(number) if self.error is not Interrupted else Interrupted
        if again:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        if (
            self.at_once and not self._ending
        ):  # launchers repeat their signals: that must not interrupt what `finally` does
            self._ending = True
            raise _AtOnce


class _AtOnce(KeyboardInterrupt):
    """No Exception, so that nothing on the way takes it for a failure."""


_active: StopRequest | None = None


def asked() -> type[DadFastError] | None:
    """What has been asked for; None outside of the blocks below."""
    return _active.error if _active is not None else None


@contextmanager
def stop_requests(pass_on: Callable[[int], None] | None = None) -> Iterator[StopRequest]:
    """In the block a signal is a request. A block inside another one shares it. `pass_on` gets every signal too.

    Outside the main thread there are no handlers to install.
    """
    with _handled() as request:
        before = request.at_once, request.pass_on
        request.at_once, request.pass_on = False, pass_on or request.pass_on
        try:
            yield request
        finally:
            request.at_once, request.pass_on = before


@contextmanager
def ends_at_once(words: str) -> Iterator[None]:
    """In the block a signal raises Preempted or Interrupted with these words, and so does one that came before and has no answer yet.

    Python's handlers wait for C: for an import, a step of a compiler, or for other processes that do not come. Where the block has not
    ended in PATIENCE seconds, the process ends with the same words and exit code.
    """
    with _handled() as request, _watched(request, words):
        before = request.at_once
        try:
            request.at_once = True
            if request.error is not None:
                raise request.error(words)
            yield
            request.at_once = before
        except _AtOnce:
            assert request.error is not None
            raise request.error(words) from None
        finally:
            request.at_once = before


@contextmanager
def _handled() -> Iterator[StopRequest]:
    """The handlers, for the length of the outermost block."""
    global _active
    if _active is not None:
        yield _active
        return
    request = _active = StopRequest()
    previous = {}
    with suppress(ValueError):  # not the main thread
        for number in NUMBERS:
            previous[number] = signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _active = None


_watching = False


@contextmanager
def _watched(request: StopRequest, words: str) -> Iterator[None]:
    """A thread that hears of a signal when the system does; one for the outermost block."""
    global _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()
    threading.Thread(
        target=_watch, args=(request, words, reading, ended), daemon=True, name="signals"
    ).start()
    previous, _watching = signal.set_wakeup_fd(writing, warn_on_full_buffer=False), True
    try:
        yield
    finally:
        _watching = False
        signal.set_wakeup_fd(previous)
        ended.set()
        os.close(writing)


def _watch(request: StopRequest, words: str, reading: int, ended: threading.Event) -> None:
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in NUMBERS:
                continue
            until = time.monotonic() + PATIENCE
            while request.at_once and time.monotonic() < until:
                if ended.wait(0.1):
                    return
            if request.at_once:
                error = request.error or _error(number[0])
                os.write(
                    2, f"dad-fast: error: {words}\n".encode()
                )  # the main thread may hold the lock of sys.stderr
                os._exit(error.exit_code)


def _error(number: int) -> type[DadFastError]:
    return Interrupted if number == signal.SIGINT else Preempted
