"""What a discretizer is: pixels -> the nearest image that its codes can represent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.config.schema import PrecisionConfig


class Discretized(NamedTuple):
    images: Tensor  # float32 [B, 3, H, W] in [0, 1]
    codes: Tensor | None  # int64 [B, h, w]; None where the discretizer has no codes


class Discretizer:
    """Base class of discretizers. Called on pixels float32 [B, 3, H, W] in [0, 1]; no gradient passes through.

    A discretizer without codes overrides `__call__` alone and sets `name` and `provenance`. The other attributes and
    methods tell the engine and the store what else it can do, so that nobody asks for its class.
    """

    name: str
    provenance: str  # what it was trained on
    weights_sha256: str | None = None  # of the weights' file
    code_bits: int = 0  # bits of a stored code; 0 where it has no codes
    backend: str = ""  # of the codebook search

    def __call__(self, pixels: Tensor) -> Discretized:
        raise NotImplementedError

    @property
    def codebook(self) -> Tensor | None:
        """The codebook, float [K, D], or None."""
        return None

    def code_grid(self, side: int) -> tuple[int, ...]:
        """Rows and columns of the codes of a square image of `side` pixels; () without codes."""
        return ()

    def decode_packed(self, packed: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Decode stored codes uint8 [B, code_bytes] of `grid` to images float32 [B, 3, H, W] in [0, 1]."""
        raise NotImplementedError(f"{self.name} has no codes")

    def fingerprint(self) -> str | None:
        """Hex SHA-256 of what it computes with; None where nothing is trained."""
        return None

    def notes(self) -> list[str]:
        """Lines for the log about how it was prepared."""
        return []

    def warnings(self) -> list[str]:
        """Lines for the log about what went wrong so far. Reads from the device."""
        return []

    def encoders(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """The encoder as the run uses it and the same in float64, to measure its rounding; None without an encoder."""
        return None

    def stages(self) -> list[tuple[object, str, str]]:
        """(object, method, stage name) of what a profiler should name."""
        return []


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """What the factory of a discretizer gets besides the argument after the name's colon."""

    text: str  # the whole of --discretizer
    precision: PrecisionConfig
    device: torch.device
    optimizations: object | None  # a VQGAN's; None keeps the plain model under autocast
