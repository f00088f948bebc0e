"""Python's cycle collector at times of our choosing: a collection in the middle of a step stops the queueing of GPU work for up to a
tenth of a second, and on another step in every process.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collections_between_steps() -> Iterator[None]:
    """No automatic collection inside; `gc.collect` where time does not matter. What exists by now is left out of them all."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
