"""Memory of a run: a one-line error for out of memory, and garbage collection at chosen times."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dad_fast.config.schema import Config
from dad_fast.errors import DadFastError


@contextmanager
def enough_memory(cfg: Config, device: torch.device) -> Iterator[None]:
    """Turn out of memory into a DadFastError with a batch size to try.

    The suggestion keeps the images per step: half the batch, twice the accumulation.
    """
    try:
        yield
    except RuntimeError as error:
        # torch.OutOfMemoryError on a GPU; the CPU's allocator has no class of its own.
        is_out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if not is_out_of_memory and "can't allocate memory" not in str(error):
            raise
        batch, accumulation = cfg.data.batch_size, cfg.engine.grad_accum_steps
        fix = "use a smaller model"
        if batch > 1:
            flags = f"--batch-size {batch // 2} --grad-accum-steps {2 * accumulation}"
            fix = f"try {flags}, as many images a step"
        if device.type == "cuda" and not cfg.precision.amp:
            fix += ", or --amp"
        raise DadFastError(
            f"out of memory on {device} with {batch} images at a time; {fix}; "
            "resume with --resume auto"
        ) from error


@contextmanager
def collections_between_steps() -> Iterator[None]:
    """Disable Python's automatic garbage collection; the caller runs `gc.collect` where time does
    not matter.

    A collection in the middle of a step stops the queueing of GPU work for up to a tenth of a
    second, and on another step in every process. Objects that exist on entry are frozen: no
    collection inside looks at them.
    """
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
