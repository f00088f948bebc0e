"""Exact nearest-code search: codes[n] = argmin_k sum_d (z[n, d] - e[k, d])^2.

z [N, D] latents, e [K, D] codebook, both float32, float16 or bfloat16; codes [N] int64. "Exact" is the argmin of the fp64
distance, each term rounded after the square and summed in order of d (no fused multiply-add); the lowest index wins a tie.
A latent that is not finite gets code 0; a code that is not finite never wins (if all are such: code 0).

Every back end gives the same codes, bit for bit:
- `search_csrc` (CPU): fp32 distances by tile, then fp64 among the codes inside the rounding bound (csrc/nearest_code.cpp);
- `search_torch`, D <= 16: fp64 distances dimension by dimension, in blocks of rows; no host synchronisation;
- `search_torch`, D > 16: fp64 scores |e|^2/2 - z.e by one GEMM per block, then the distance of the codes inside the GEMM's
  rounding bound. The number of those is read on the host: not for CUDA graphs.
Memory beyond the arguments: a few blocks of BLOCK_CPU or BLOCK_CUDA elements, and never [N, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels.csrc import csrc, csrc_status

BLOCK_CPU = 1 << 18  # fp64 elements per block: stays in a core's cache
BLOCK_CUDA = 1 << 23
MAX_DIFFERENCE_DIM = 16
FP64_ROUNDING = 2.0**-53


def search_reference(latents: Tensor, codebook: Tensor) -> Tensor:
    """The definition, row by row: what every back end is tested against."""
    z, e = latents.double(), codebook.double()
    codes = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for n, row in enumerate(z):
        distance = torch.zeros(len(e), dtype=torch.float64, device=z.device)
        for d in range(z.shape[1]):
            distance = distance + (row[d] - e[:, d]).square()
        distance[~e.isfinite().all(1)] = torch.inf
        if row.isfinite().all():
            codes[n] = distance.argmin()
    return codes


def _rows_per_block(z: Tensor, num_codes: int) -> int:
    return max(1, (BLOCK_CUDA if z.is_cuda else BLOCK_CPU) // num_codes)


def _by_difference(z: Tensor, e: Tensor) -> Tensor:
    """Codes of z [n, D] in e [K, D], both float64, z finite; an infinite entry makes a code lose."""
    distance = z.new_zeros(len(z), len(e))  # [n, K]
    for d in range(z.shape[1]):
        difference = z[:, d, None] - e[None, :, d]
        distance += difference.square_()  # two steps: a fused multiply-add would round differently
    return distance.argmin(1)  # the first of equal minima


def _by_score(z: Tensor, e: Tensor, valid: Tensor, half_square: Tensor) -> Tensor:
    """Codes of z [n, D] in e [K, D], both float64 and finite; valid [K], half_square [K] = |e|^2 / 2."""
    num_rows, num_codes = len(z), len(e)
    score = torch.addmm(half_square, z, e.T, alpha=-1)  # [n, K] = (|z - e|^2 - |z|^2) / 2
    # How far the score, and half the distance that decides, can be from exact; (|z| + |e|)^2 bounds every sum of products.
    margin = (z.norm(dim=1, keepdim=True) + e.norm(dim=1)).square_()  # [n, K]
    margin *= (2 * z.shape[1] + 16) * FP64_ROUNDING
    score.masked_fill_(~valid, torch.inf)
    ceiling = (score + margin).amin(1, keepdim=True)  # no winner's score can lie above it
    rows, codes = (score - margin <= ceiling).logical_and_(valid).nonzero(as_tuple=True)  # ascending
    if len(rows) == num_rows:  # one candidate each: a row without any means that no code is valid, so that none has one
        return codes
    distance = z.new_zeros(len(rows))  # [candidates]
    for d in range(z.shape[1]):
        distance += (z[rows, d] - e[codes, d]).square_()
    best = z.new_full((num_rows,), torch.inf).scatter_reduce_(0, rows, distance, "amin")
    codes = codes.masked_fill_(distance != best[rows], num_codes)
    return codes.new_full((num_rows,), num_codes).scatter_reduce_(0, rows, codes, "amin") % num_codes


def search_torch(latents: Tensor, codebook: Tensor) -> Tensor:
    """latents [N, D], codebook [K, D] -> codes [N] int64, on any device. See the module's docstring."""
    codes = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    valid = codebook.isfinite().all(1)  # [K]
    small = latents.shape[1] <= MAX_DIFFERENCE_DIM
    e = codebook.double().masked_fill(~valid[:, None], torch.inf if small else 0.0)
    half_square = None if small else e.square().sum(1) / 2
    block = _rows_per_block(latents, len(codebook))
    for first in range(0, len(latents), block):
        finite = latents[first : first + block].isfinite().all(1)
        z = latents[first : first + block].double().masked_fill_(~finite[:, None], 0.0)
        found = _by_difference(z, e) if half_square is None else _by_score(z, e, valid, half_square)
        codes[first : first + block] = found.masked_fill_(~finite, 0)
    return codes


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


@torch.library.custom_op("dad_fast::nearest_code", mutates_args=())
def _nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    return search_torch(latents, codebook)


@_nearest_code.register_kernel("cpu")
def _(latents: Tensor, codebook: Tensor) -> Tensor:
    return search_torch(latents, codebook) if csrc() is None else search_csrc(latents, codebook)


@_nearest_code.register_fake
def _(latents: Tensor, codebook: Tensor) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code of each latent, exactly; the lowest index wins a tie.

    latents: [N, D], or [B, D, H, W] as an encoder gives them; codebook: [K, D], K >= 1, D >= 1; float32, float16 or bfloat16
    with any strides, on one device. Returns int64 codes, [N] or [B, H, W]. No gradient passes. Autocast does not change it.
    A latent that is not finite gets code 0; a code that is not finite never wins. D > 16 on CUDA synchronises with the host.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    if latents.ndim not in (2, 4) or codebook.ndim != 2 or latents.shape[1] != codebook.shape[1] or 0 in codebook.shape:
        raise ValueError(
            f"latents [N, D] or [B, D, H, W] and codebook [K, D] are needed, not {list(latents.shape)} and {list(codebook.shape)}"
        )
    for tensor in (latents, codebook):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"latents and codebook must be float32, float16 or bfloat16, not {tensor.dtype}")
    if latents.ndim == 2:
        return _nearest_code(latents.detach(), codebook.detach())
    batch, dim, height, width = latents.shape
    flat = latents.detach().permute(0, 2, 3, 1).reshape(-1, dim)  # [B H W, D]
    return _nearest_code(flat, codebook.detach()).view(batch, height, width)
