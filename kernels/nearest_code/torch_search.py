"""Exact search in plain torch, on any device.

D <= 16: fp64 distances dimension by dimension, in blocks of rows; no host synchronisation. D > 16:
fp64 scores |e|^2/2 - z.e by one GEMM per block, then the distance of the codes inside the GEMM's
rounding bound. The number of those is read on the host: not for CUDA graphs. Memory beyond the
arguments: a few blocks of BLOCK_CPU or BLOCK_CUDA elements, and never [N, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_CPU = 1 << 18  # fp64 elements per block: stays in a core's cache
BLOCK_CUDA = 1 << 23
MAX_DIFFERENCE_DIM = 16
FP64_ROUNDING = 2.0**-53


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
    """Codes of z [n, D] in e [K, D], both float64 and finite; valid [K], half_square [K] = |e|^2 /
    2.
    """
    num_rows, num_codes = len(z), len(e)
    score = torch.addmm(half_square, z, e.T, alpha=-1)  # [n, K] = (|z - e|^2 - |z|^2) / 2
    # How far the score, and half the distance that decides, can be from exact; (|z| + |e|)^2 bounds
    # every sum of products.
    margin = (z.norm(dim=1, keepdim=True) + e.norm(dim=1)).square_()  # [n, K]
    margin *= (2 * z.shape[1] + 16) * FP64_ROUNDING
    score.masked_fill_(~valid, torch.inf)
    ceiling = (score + margin).amin(1, keepdim=True)  # no winner's score can lie above it
    # Ascending.
    rows, codes = (score - margin <= ceiling).logical_and_(valid).nonzero(as_tuple=True)
    # One candidate each: a row without any means that no code is valid, so that none has one.
    if len(rows) == num_rows:
        return codes
    distance = z.new_zeros(len(rows))  # [candidates]
    for d in range(z.shape[1]):
        distance += (z[rows, d] - e[codes, d]).square_()
    best = z.new_full((num_rows,), torch.inf).scatter_reduce_(0, rows, distance, "amin")
    codes = codes.masked_fill_(distance != best[rows], num_codes)
    return (
        codes.new_full((num_rows,), num_codes).scatter_reduce_(0, rows, codes, "amin") % num_codes
    )


def available(device: torch.device, num_codes: int, dim: int) -> str:
    """ "": it is available everywhere."""
    return ""


def prepare(codebook: Tensor) -> Tensor:
    return codebook


def search(latents: Tensor, codebook: Tensor, codes: Tensor, num_nonfinite: Tensor) -> None:
    """latents [N, D], codebook [K, D] -> codes [N] int64; num_nonfinite grows by the number of
    non-finite latents.
    """
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
        num_nonfinite += finite.logical_not_().sum()


def search_torch(latents: Tensor, codebook: Tensor) -> Tensor:
    """latents [N, D], codebook [K, D] -> codes [N] int64, on any device."""
    codes = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    search(latents, codebook, codes, torch.zeros((), dtype=torch.int64, device=latents.device))
    return codes
