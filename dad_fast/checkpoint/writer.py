"""Write files in a thread while training continues."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Writer:
    """Runs one write at a time in a thread.

    The next call of any method raises the thread's error.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Start `write`, after waiting for the write before."""
        self.wait()

        def work() -> None:
            try:
                write()
            except BaseException as error:
                # Raised in the training thread.
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a finished write, without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> float:
        """Wait until everything is on the disk. Returns the seconds waited."""
        begun = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return time.perf_counter() - begun
