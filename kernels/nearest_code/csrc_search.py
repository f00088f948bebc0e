"""Exact search on the CPU by csrc/nearest_code.cpp: fp32 by tiles of the codebook, then fp64 among
the codes inside the rounding bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels.csrc import csrc, csrc_status


def available(device: torch.device, num_codes: int, dim: int) -> str:
    """Return "" if this back end can search a codebook [num_codes, dim] on the device, else the
    reason.
    """
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
    """Search latents [N, D] float32, contiguous; return codes [N] int64; num_nonfinite grows by the
    number of non-finite latents.

    instruction_set indexes the library's `instruction_sets()`; 0 is the fastest that this processor
    supports.
    """
    library = csrc()
    assert library is not None
    num_nonfinite += library.nearest_code(
        latents, *state, codes, torch.get_num_threads(), instruction_set
    )


def search_csrc(latents: Tensor, codebook: Tensor, instruction_set: int = 0) -> Tensor:
    """Search latents [N, D] in a codebook [K, D] on the CPU; return codes [N] int64.

    Raises EnvironmentProblem without the library.
    """
    if csrc() is None:
        raise EnvironmentProblem(f"csrc is {csrc_status()}")
    codes = torch.empty(len(latents), dtype=torch.int64)
    z, e = (tensor.detach().float().contiguous() for tensor in (latents, codebook))
    search(z, prepare(e), codes, torch.zeros((), dtype=torch.int64), instruction_set)
    return codes
