"""float32 on CUDA: IEEE, or TF32 in matrix products and convolutions.

torch computes convolutions in TF32 unless told otherwise, at 2^-11 relative rounding. A run allows
TF32 for the whole step (`precision.tf32`); the attack and the encoder, whose results turn on
differences that small, ask for IEEE themselves. The codebook search has no float32 product.

The flags are global and read when an operation is dispatched: by the backward pass too, and in the
capture of a CUDA graph, which keeps the kernels chosen then. Stages in 16 bits ignore them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_math(*, tf32: bool) -> Iterator[None]:
    """Compute float32 products and convolutions inside in TF32, or in IEEE float32."""
    matmul, conv, rnn = _backends()
    before = matmul.fp32_precision, conv.fp32_precision, rnn.fp32_precision
    inside = "tf32" if tf32 else "ieee"
    _set(inside, inside, inside)
    try:
        yield
    finally:
        _set(*before)


def _backends() -> tuple[Any, Any, Any]:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def _set(matmul: str, conv: str, rnn: str) -> None:
    # The older flags first: torch raises where they contradict the newer ones, and alone they would
    # not override a precision that the user set for all back ends.
    torch.backends.cuda.matmul.allow_tf32 = matmul == "tf32"
    torch.backends.cudnn.allow_tf32 = conv == "tf32"
    for backend, precision in zip(_backends(), (matmul, conv, rnn), strict=True):
        backend.fp32_precision = precision
