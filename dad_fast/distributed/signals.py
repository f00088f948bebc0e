"""Stop on SIGTERM, SIGUSR1 and Ctrl-C: exit code 75, or 130 for Ctrl-C.

In `ends_at_once`, for work with nothing to save, a signal raises at once, like Ctrl-C in any Python
program, and runs every `finally`. In `stop_requests`, a signal is a request: the work that must
save, or agree with other processes, polls it (`asked`) and stops at its next boundary. The blocks
may be nested; the innermost counts. Imports nothing heavy.
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
# Seconds for a block of `ends_at_once` to end after a signal; then another thread ends the process.
PATIENCE = 25.0


class StopRequest:
    """State of the stop request.

    error: None, Preempted (exit 75) or Interrupted (exit 130, also after a SIGTERM).
    at_once: whether there is nothing to save. pass_on: receives every signal.
    """

    def __init__(self) -> None:
        self.error: type[DadFastError] | None = None
        self.at_once = False
        self.pass_on: Callable[[int], None] | None = None
        self._ending = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.pass_on is not None:
            self.pass_on(number)
        again = number == signal.SIGINT and self.error is Interrupted
        self.error = _error(number) if self.error is not Interrupted else Interrupted
        if again:
            # A second Ctrl-C stops at once.
            raise KeyboardInterrupt
        # Launchers repeat their signals, which must not interrupt a `finally`.
        if self.at_once and not self._ending:
            self._ending = True
            raise _AtOnce


class _AtOnce(KeyboardInterrupt):
    """Not an Exception, so that no handler on the way catches it as a failure."""


_active: StopRequest | None = None


def asked() -> type[DadFastError] | None:
    """Return the requested stop; None without one, and outside of the blocks below."""
    return _active.error if _active is not None else None


@contextmanager
def stop_requests(pass_on: Callable[[int], None] | None = None) -> Iterator[StopRequest]:
    """Treat a signal as a request inside the block; nested blocks share it.

    pass_on: receives every signal too. Installs no handlers outside of the main thread.
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
    """Raise Preempted or Interrupted with the message `words` on a signal inside the block.

    A request from before the block counts too. Python runs handlers only between bytecodes, so an
    import, a compiler or a collective may delay them: if the block has not ended after PATIENCE
    seconds, the process exits with the same message and exit code.
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
    """Install the handlers for the duration of the outermost block."""
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
    """Run a thread that learns of a signal at once; only for the outermost block."""
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
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _watching = True
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
                # The main thread may hold the lock of sys.stderr.
                os.write(2, f"dad-fast: error: {words}\n".encode())
                os._exit(error.exit_code)


def _error(number: int) -> type[DadFastError]:
    return Interrupted if number == signal.SIGINT else Preempted
