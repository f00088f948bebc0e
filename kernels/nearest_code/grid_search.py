"""Exact search by a grid over the space of latents, D <= 4: each cell lists every code that can be
nearest in it (csrc/code_grid.h).

A query reads one cell's list, about ten codes. Building takes seconds for 16384 codes, so the grid
of a codebook is kept in the user's cache folder under the hash of its values: a block of bytes with
a checksum, written atomically. A block that is damaged or belongs to another version or codebook is
rebuilt. Memory: at most 256 MB for a grid, three times that while it is built; 8 to 21 MB for 16384
codes of the benchmarks.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from dad_fast.errors import UsageError
from dad_fast.kernels.csrc import csrc, csrc_status

MAX_DIM, MAX_CODES = 4, 65536
CELLS_PER_CODE = 4.0
VERSION = b"dad-fast grid 1\n"  # raised when the block or what is built into it changes


def available(device: torch.device, num_codes: int, dim: int) -> str:
    """Return "" if this back end can search a codebook [num_codes, dim] on the device, else the
    reason.
    """
    if dim > MAX_DIM:
        return f"it is for latents of at most {MAX_DIM} dimensions, not {dim}"
    if num_codes > MAX_CODES:
        return f"it is for codebooks of at most {MAX_CODES} codes, not {num_codes}"
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return "" if csrc() is not None else f"csrc is {csrc_status()}"


def prepare(codebook: Tensor) -> Tensor:
    """Return the grid of a codebook [K, D] float32 on the CPU, contiguous, as uint8 [bytes]:
    cached, or built and cached.

    Raises UsageError if the codebook has no grid: no code is finite, or the lists are too long.
    """
    from dad_fast.cache import cache_dir

    values = codebook.detach().cpu().contiguous()
    key = hashlib.sha256(VERSION + repr(tuple(values.shape)).encode())
    key.update(_bytes(values))
    path = cache_dir() / "codebooks" / f"{key.hexdigest()[:32]}.grid"
    grid = read_grid(path, values)
    if grid is None:
        grid = build_grid(values)
        write_grid(path, grid)
    return grid


def build_grid(codebook: Tensor) -> Tensor:
    """As `prepare`, without the cache."""
    library = csrc()
    assert library is not None
    block = library.grid_build(codebook, CELLS_PER_CODE, torch.get_num_threads())
    if not block:
        raise UsageError(
            "no grid serves this codebook: its codes are not finite or its lists are too long; choose another back end"
        )
    return torch.frombuffer(bytearray(block), dtype=torch.uint8)


def read_grid(path: Path, codebook: Tensor) -> Tensor | None:
    """Read a cached grid; None if the file is missing, damaged or of another codebook."""
    library = csrc()
    assert library is not None
    try:
        content = bytearray(path.read_bytes())
    except OSError:
        return None
    head = len(VERSION) + 32
    block = memoryview(content)[head:]
    if content[:head] != VERSION + hashlib.sha256(block).digest() or not block:
        return None
    grid = torch.frombuffer(content, dtype=torch.uint8, offset=head).clone()  # aligned
    return None if library.grid_check(grid, codebook) else grid


def write_grid(path: Path, grid: Tensor) -> bool:
    """False where the folder cannot be written: then the grid is built again next time."""
    from dad_fast.cache import write_cache

    block = _bytes(grid)
    return write_cache(path, VERSION + hashlib.sha256(block).digest() + block)


def _bytes(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)  # needs no numpy


def search(
    latents: Tensor, grid: Tensor, codes: Tensor, num_nonfinite: Tensor, instruction_set: int = 0
) -> None:
    """Search latents [N, D] float32, contiguous; return codes [N] int64; num_nonfinite grows by the
    number of non-finite latents.

    instruction_set indexes the library's `instruction_sets()`; 0 is the fastest that this processor
    supports.
    """
    library = csrc()
    assert library is not None
    num_nonfinite += library.grid_search(
        latents, grid, codes, torch.get_num_threads(), instruction_set
    )
