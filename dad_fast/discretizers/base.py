"""Base of discretizers: pixels -> the nearest image that the codebook can represent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.config.schema import PrecisionConfig
from dad_fast.errors import UsageError
from dad_fast.kernels.cases import Case

# Provenance of a discretizer without a learned part
NOT_TRAINED = "nothing: it is not trained"


class Discretized(NamedTuple):
    """Result of a discretizer."""

    images: Tensor  # float32 [B, 3, H, W] in [0, 1]
    codes: Tensor | None  # int64 [B, h, w]; None if the discretizer has no codes


class Discretizer(ABC):
    """Base class of discretizers.

    Called on pixels float32 [B, 3, H, W] in [0, 1]; no gradient passes through.

    A discretizer without codes overrides only `__call__` and sets `name` and `provenance`. The
    other attributes and methods describe its capabilities, so that engine and store never check its
    class.
    """

    name: str
    provenance: str  # training data
    image_size: int = 0  # side of the training images in pixels; 0 if it is not known
    weights_sha256: str | None = None  # of the weights' file
    code_bits: int = 0  # bits of a stored code; 0 without codes
    backend: str = ""  # of the codebook search
    kernels: tuple[str, ...] = ()  # names of the kernels that it may use on CUDA (kernels/cases.py)

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Discretized:
        """Return the images that the codes represent, and the codes."""

    @property
    def codebook(self) -> Tensor | None:
        """Codebook, float [K, D], or None."""
        return None

    def code_grid(self, side: int) -> tuple[int, ...]:
        """Rows and columns of the codes of a square image of `side` pixels; () without codes."""
        return ()

    def describe_codes(self, side: int) -> str:
        """Describe the codes of a square image of `side` pixels, for the log."""
        if not self.code_bits:
            return "no codes"
        grid = "x".join(map(str, self.code_grid(side)))
        return f"{grid} codes of {self.code_bits} bits per image"

    def decode_packed(self, packed: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Decode stored codes uint8 [B, code_bytes] of `grid` to images float32 [B, 3, H, W] in [0,
        1].
        """
        raise UsageError(f"--discretizer {self.name}: has no codes to decode")

    def fingerprint(self) -> str | None:
        """Hex SHA-256 of the weights; None if nothing is trained."""
        return None

    def notes(self) -> list[str]:
        """Lines for the log about its preparation."""
        return []

    def warnings(self) -> list[str]:
        """Lines for the log about problems so far. Reads from the device."""
        return []

    def encoders(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """Encoder in the precision of the run and in float64, to measure its rounding; None without
        an encoder.
        """
        return None

    def kernel_cases(self, side: int) -> Iterator[Case]:
        """Yield test cases of its `kernels` on images of `side` pixels."""
        return iter(())

    def use_kernel(self, name: str, on: bool) -> None:
        """Use one of its `kernels`, or torch in its place.

        Raises UsageError unless a subclass that names kernels replaces this method.
        """
        raise UsageError(
            f"--discretizer {self.name}: it names the kernel {name} and has no use_kernel to replace "
            "it; add --kernels off"
        )

    def time_forms(self, side: int, batch_size: int) -> dict[str, tuple[str, str]]:
        """Choose between equivalent forms by timing them on this GPU.

        Returns the choice and its reason, by name. A collective.
        """
        return {}

    def stages(self) -> list[tuple[object, str, str]]:
        """(object, method, stage name) of each stage that a profiler should label."""
        return []


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """Arguments of a discretizer's factory, next to the argument after the name's colon."""

    text: str  # the whole of --discretizer
    precision: PrecisionConfig
    device: torch.device
    optimizations: object | None  # a VQGAN's; None keeps the plain model under autocast
    # Build the architecture as for a GPU: values of weights do not matter.
    shapes_only: bool = False
    micro_batch: int = 0  # images at once; 0 = by their size
