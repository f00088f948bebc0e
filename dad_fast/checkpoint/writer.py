"""Files that are written while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Writer:
    """A thread for one piece of writing at a time. What fails there is raised here, by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Begin with `write`, after what is under way."""
        self.wait()

        def work() -> None:
            try:
                write()
            except BaseException as error:  # whatever it is belongs to the training thread
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what failed, without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> float:
        """Until everything is on the disk; returns for how many seconds that was."""
        begun = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return time.perf_counter() - begun
