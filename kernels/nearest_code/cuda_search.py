"""Exact search on a GPU by the same grid as on the CPU (csrc/nearest_code_grid.cu), D <= 4: one
launch, no synchronisation with the host.

Not yet run on a GPU. The cells, lists and distances are those of csrc/code_grid.h, which the CPU
tests cover.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.kernels.csrc import csrc, csrc_cuda, csrc_cuda_status
from dad_fast.kernels.nearest_code import grid_search


class DeviceGrid(NamedTuple):
    header: Tensor  # uint8 on the CPU: launching reads the sizes from it
    grid: Tensor  # uint8 on the GPU


def available(device: torch.device, num_codes: int, dim: int) -> str:
    """Return "" if this back end can search a codebook [num_codes, dim] on the device, else the
    reason.
    """
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if csrc_cuda() is None:
        return f"csrc's CUDA half is {csrc_cuda_status()}"
    return grid_search.available(torch.device("cpu"), num_codes, dim)  # which builds the grid


def prepare(codebook: Tensor) -> DeviceGrid:
    """As `grid_search.prepare`, and copied to the codebook's device."""
    grid = grid_search.prepare(codebook)
    return DeviceGrid(grid[:256].clone(), grid.to(codebook.device))


def search(latents: Tensor, state: DeviceGrid, codes: Tensor, num_nonfinite: Tensor) -> None:
    """Search latents [N, D] float32, contiguous; return codes [N] int64; num_nonfinite grows by the
    number of non-finite latents.
    """
    library = csrc_cuda()
    assert library is not None and csrc() is not None
    library.grid_search_cuda(latents, state.header, state.grid, codes, num_nonfinite)
