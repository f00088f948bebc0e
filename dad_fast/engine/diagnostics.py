"""What an attack really did: the share of codes it changed, and its size against the encoder's own rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def share_changed(codes: Tensor, reference: Tensor) -> Tensor:
    """Share of codes that differ, scalar float32; both int64 [B, h, w]. The attack's true strength (arXiv 2209.07735)."""
    return (codes != reference).float().mean()


def signal_to_rounding(
    encode: Callable[[Tensor], Tensor],
    encode_exact: Callable[[Tensor], Tensor],
    pixels: Tensor,
    perturbed: Tensor,
) -> Tensor:
    """Root mean square of the latents' change by the attack over that of the encoder's rounding; scalar float32.

    `encode` is the encoder as the run uses it, `encode_exact` the same in float64 or float32. Below about 1 the codes change by
    rounding as much as by the attack: with an L2 budget of 0.1 at 224 px this is so in fp16, bf16 and even tf32.
    """
    exact = encode_exact(pixels).double()
    signal = encode_exact(perturbed).double() - exact
    rounding = encode(pixels).double() - exact
    tiny = torch.finfo(torch.float64).tiny
    return (signal.square().mean().sqrt() / rounding.square().mean().sqrt().clamp(min=tiny)).float()
