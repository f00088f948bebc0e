"""Finite scalar quantization (Mentzer et al., arXiv 2309.15505): codes without a learned codebook.

Each dimension of a latent is squashed by tanh to the range of its L levels and rounded, so a code
is a tuple of integers. Its number is that of the tuple in mixed radix, the first dimension least
significant; its value is the tuple in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Widens the range a little, so that the outermost levels are reached (section 3.1 of the paper).
MARGIN = 1e-3


def bounded(latents: Tensor, levels: Sequence[int]) -> Tensor:
    """Squash `latents` [B, D, h, w] to where rounding gives `levels[d]` integers in dimension d.

    The integers are -(L - 1)/2 to (L - 1)/2 for an odd L, -L/2 to L/2 - 1 for an even one; 0 stays
    0. Differentiable.
    """
    half, offset, shift = (_column(latents, values) for values in _ranges(levels))
    return torch.tanh(latents + shift) * half - offset


def fsq_codes(latents: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the codes int64 [B, h, w] of `latents` [B, D, h, w]; 0 for one that is not finite.

    No gradient.
    """
    latents = latents.detach()
    # A tie rounds to the even integer.
    digits = bounded(latents, levels).round() + _column(latents, [n // 2 for n in levels])
    radix = _column(latents, [math.prod(levels[:d]) for d in range(len(levels))])
    finite = latents.isfinite().all(1, keepdim=True)
    # float32 is exact up to 2^24, above the number of codes that a configuration may have.
    return torch.where(finite, digits * radix, 0.0).sum(1).round().long()


def fsq_codebook(levels: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the values of all codes, float32 [K, D] in [-1, 1]."""
    numbers = torch.arange(math.prod(levels), device=device)
    columns = []
    for size in levels:
        half = size // 2
        columns.append((numbers % size - half).float() / half)
        numbers = numbers // size
    return torch.stack(columns, dim=1)


def straight_through(latents: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the rounded values of `latents` [B, D, h, w], with the gradient of `bounded` alone."""
    x = bounded(latents, levels)
    rounded = x + (x.round() - x).detach()
    return rounded / _column(latents, [n // 2 for n in levels])


class FSQSearch:
    """Rounding with the interface of `CodebookSearch`."""

    backend = "fsq"

    def __init__(self, codebook: Tensor, levels: Sequence[int]) -> None:
        self.codebook = codebook.detach().float()
        self.levels = tuple(levels)
        # Counts latents that are not finite, over all searches.
        self.num_nonfinite = torch.zeros((), dtype=torch.int64, device=codebook.device)

    def search(self, latents: Tensor) -> Tensor:
        """Return codes int64 [B, h, w] of `latents` [B, D, h, w]."""
        self.num_nonfinite += (~latents.isfinite().all(1)).sum()
        return fsq_codes(latents, self.levels)


def _ranges(levels: Sequence[int]) -> tuple[list[float], list[float], list[float]]:
    """Return scale, offset and shift of tanh for each dimension."""
    half = [(n - 1) * (1 + MARGIN) / 2 for n in levels]
    offset = [0.0 if n % 2 else 0.5 for n in levels]
    shift = [math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
    return half, offset, shift


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """Return `values` as [1, D, 1, 1]."""
    # Filled on the device: a copy from the host could not be captured in a CUDA graph.
    parts = [like.new_full((1, 1, 1, 1), value) for value in values]
    return torch.cat(parts, dim=1)
