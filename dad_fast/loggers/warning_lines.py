"""Warnings of this package as lines, each once; those of other libraries are hidden."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dad_fast.errors import printable

OURS = "dad_fast"
# Warnings that some handler has printed: a data set may be opened several times.
_printed: set[str] = set()


class WarningLines(logging.Handler):
    """Handler that prints each distinct warning once, as one line on stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def install(self) -> None:
        """Take the place of another handler of this kind."""
        self.remove_all()
        self.add()

    def add(self) -> None:
        """Receive warnings besides other handlers of this kind."""
        logging.getLogger(OURS).addHandler(self)

    @staticmethod
    def remove_all() -> None:
        logger = logging.getLogger(OURS)
        for handler in list(logger.handlers):
            if isinstance(handler, WarningLines):
                logger.removeHandler(handler)

    def emit(self, record: logging.LogRecord) -> None:
        text = f"warning: {record.getMessage()}"
        is_new = text not in _printed
        _printed.add(text)
        self.write(text, is_new)

    def write(self, text: str, is_new: bool) -> None:
        # Of several processes that open the same data, the first one warns.
        if is_new and os.environ.get("RANK", "0") == "0":
            print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def own_warnings_only(debug: bool) -> Iterator[None]:
    """Print this package's warnings, and hide those of other libraries, in this block.

    They name lines of other people's code and not a user's file or flag. `debug` and Python's own
    -W and PYTHONWARNINGS show them.
    """
    _printed.clear()
    WarningLines().install()
    root, nothing = logging.getLogger(), logging.NullHandler()
    with warnings.catch_warnings():
        if not debug:
            # Else Python prints warnings of loggers without a handler.
            root.addHandler(nothing)
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.removeHandler(nothing)
            WarningLines.remove_all()
