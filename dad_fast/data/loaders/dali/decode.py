"""JPEG decoding by DALI, for the timings of `dad-fast doctor --data` and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

BATCH = 32


def decoder(files: Sequence[bytes], device: str, num_threads: int) -> Callable[[], None]:
    """Return a function that decodes all `files` once, in batches of 32 at most, and waits.

    Upsampling of colours is PIL's.

    Args:
        files: JPEGs that DALI can decode.
        device: "cpu", or "mixed" for the first GPU (not yet run on one).
    """
    images = [np.frombuffer(content, np.uint8) for content in files]
    num = len(images)
    calls = -(-num // BATCH)
    parts = [images[part * num // calls : (part + 1) * num // calls] for part in range(calls)]

    gpu = 0 if device == "mixed" else None

    @pipeline_def(
        batch_size=BATCH,
        num_threads=num_threads,
        device_id=gpu,
        exec_async=False,
        exec_pipelined=False,
    )
    def pipeline():
        encoded = fn.external_source(
            source=parts, cycle=True, batch=True, dtype=types.UINT8, ndim=1
        )
        return fn.decoders.image(
            encoded,
            device=device,
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            use_fast_idct=False,
        )

    running = pipeline()
    running.build()

    def decode() -> None:
        for _ in parts:
            running.run()
        if device == "mixed":
            torch.cuda.synchronize()

    return decode
