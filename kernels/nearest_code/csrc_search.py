"""Exact search on the CPU by csrc/nearest_code.cpp: fp32 by tiles of the codebook, then fp64 among the codes inside the rounding bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels.csrc import csrc, csrc_status


def available(device: torch.device, num_codes: int, dim: int) -> str:
    """ "" where this back end can search a codebook [num_codes, dim] on the device, else why not."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return "" if csrc() is not None else f"csrc is {csrc_status()}"


class Prepared(NamedTuple):
    codebook: Tensor  # [K, D] float32
    tiles: Tensor  # the same in the order in which the inner loops read it (csrc/nearest_code.cpp)


def prepare(codebook: Tensor) -> Prepared:
    """codebook [K, D] float32 on the CPU, contiguous."""
    library = csrc()
    assert library is not None
    tiles = torch.empty(library.codebook_size(codebook))
    library.codebook_prepare(codebook, tiles)
    return Prepared(codebook, tiles)


def search(
    latents: Tensor, state: Prepared, codes: Tensor, num_nonfinite: Tensor, instruction_set: int = 0
) -> None:
    """latents [N, D] float32, contiguous -> codes [N] int64; num_nonfinite grows by the number of latents that are not finite.

    instruction_set indexes the library's `instruction_sets()`; 0 is the fastest that the processor runs.
    """
    library = csrc()
    assert library is not None
    num_nonfinite += library.nearest_code(
        latents, *state, codes, torch.get_num_threads(), instruction_set
    )


def search_csrc(latents: Tensor, codebook: Tensor, instruction_set: int = 0) -> Tensor:
    """latents [N, D], codebook [K, D] on the CPU -> codes [N] int64. Without the library: EnvironmentProblem."""
    if csrc() is None:
        raise EnvironmentProblem(f"csrc is {csrc_status()}")
    codes = torch.empty(len(latents), dtype=torch.int64)
    z, e = (tensor.detach().float().contiguous() for tensor in (latents, codebook))
    search(z, prepare(e), codes, torch.zeros((), dtype=torch.int64), instruction_set)
    return codes
