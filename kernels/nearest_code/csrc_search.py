"""Exact search on the CPU by csrc/nearest_code.cpp: fp32 distances by tile, then fp64 among the codes inside the rounding bound."""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels.csrc import csrc, csrc_status


def search_csrc(latents: Tensor, codebook: Tensor, instruction_set: int = 0) -> Tensor:
    """latents [N, D], codebook [K, D] on the CPU -> codes [N] int64. Without the library: EnvironmentProblem.

    instruction_set indexes the library's `instruction_sets()`; 0 is the fastest that the processor runs.
    """
    library = csrc()
    if library is None:
        raise EnvironmentProblem(f"csrc is {csrc_status()}")
    codes = torch.empty(len(latents), dtype=torch.int64)
    z, e = (tensor.detach().float().contiguous() for tensor in (latents, codebook))
    library.nearest_code(z, e, codes, torch.get_num_threads(), instruction_set)
    return codes
