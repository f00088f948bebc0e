"""Random generators of one of several students that train in one process.

A student's dropout must not depend on the others. So each student draws from generators of its own,
which take the place of the global ones while it works: those of Python, NumPy, torch and the
device. The device's generator changes place by pointer, as CUDA graphs need: a graph captured
inside `active` draws from the student's own generator at every replay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class OwnRandom:
    """States of the global generators, taken at its creation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = _host_states()
        self._on_device: Any = None
        if device.type == "cuda":
            own = torch.Generator(device)
            own.set_state(torch.cuda.get_rng_state(device))
            self._on_device = own.graphsafe_get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from these generators inside the block, and from the others after it."""
        others, other_on_device = _host_states(), None
        _set_host_states(self._host)
        if self._on_device is not None:
            generator = torch.cuda.default_generators[self._device.index or 0]
            other_on_device = generator.graphsafe_get_state()
            generator.graphsafe_set_state(self._on_device)
        try:
            yield
        finally:
            self._host = _host_states()
            _set_host_states(others)
            if other_on_device is not None:
                # A broken capture has put a fresh one in its place.
                self._on_device = generator.graphsafe_get_state()
                generator.graphsafe_set_state(other_on_device)


def _host_states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_host_states(states: tuple[Any, Any, torch.Tensor]) -> None:
    python, numpy, host = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(host)
