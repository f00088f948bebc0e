"""Copy the next batch to the GPU while the current step runs: two static buffers, a side stream.
Not yet run on a GPU.

Pixels travel as uint8. An event on the device delays the next copy into a buffer until the step
that reads the buffer has finished; the host never waits here. On a CPU batches pass unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from dad_fast.data.loaders.loader import Batch


def feed(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield `batches` on `device`, in order. On CUDA a batch stays valid until the second `next`
    after it.

    Batches may lie in pinned host memory or already on the device; all have the shapes of the
    first.
    """
    return _to_gpu(batches, device) if device.type == "cuda" else batches


def _to_gpu(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    side = torch.cuda.Stream(device)
    slots = (_Slot(), _Slot())
    for number in count():
        slot = slots[number % 2]
        # `next` runs on the side stream too: DALI binds a batch to the current stream.
        with torch.cuda.stream(side):
            batch = next(batches, None)
            if batch is None:
                return
            if slot.read is not None:
                side.wait_event(slot.read)
            staged = slot.fill(batch, device)
            written = side.record_event()
        torch.cuda.current_stream(device).wait_event(written)
        yield staged
        # By now the step is queued.
        slot.read = torch.cuda.current_stream(device).record_event()


class _Slot:
    """One buffer per tensor of a batch, at fixed addresses."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.read: torch.cuda.Event | None = None

    def fill(self, batch: Batch, device: torch.device) -> Batch:
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        if not self.buffers:
            self.buffers = {
                name: torch.empty_like(value, device=device) for name, value in tensors.items()
            }
        for name, value in tensors.items():
            self.buffers[name].copy_(value, non_blocking=True)
        return replace(batch, **self.buffers)
