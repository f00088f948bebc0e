"""Out of memory, said with the batch size to try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dad_fast.config.schema import Config
from dad_fast.errors import DadFastError


@contextmanager
def enough_memory(cfg: Config, device: torch.device) -> Iterator[None]:
    """A step in this block that finds no memory raises DadFastError with half the batch and twice the accumulation: as many images."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError on a GPU; the CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        batch, parts = cfg.data.batch_size, cfg.engine.grad_accum_steps
        halved = (
            f"try --batch-size {batch // 2} --grad-accum-steps {2 * parts}, as many images a step"
        )
        mend = halved if batch > 1 else "take a smaller model"
        amp = "" if cfg.precision.amp or device.type != "cuda" else ", or --amp"
        raise DadFastError(
            f"out of memory on {device} with {batch} images at a time; {mend}{amp}; --resume auto goes on"
        ) from error
