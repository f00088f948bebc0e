"""Tolerances that hold on any machine for two correct computations of one function.

Matrix products, convolutions and sums add their terms in an order that depends on the CPU's
instruction set, the library, the shape and the number of threads. Only the same operation on the
same shape and layout gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference relative to that of `exact`, in float64."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_as_exact(found: Tensor, plain: Tensor, exact: Tensor, ulps: float = 4) -> None:
    """Assert an error of at most twice that of plain torch in the same dtype, plus some ulps."""
    ours, allowed = (
        error(found, exact),
        2 * error(plain, exact) + ulps * torch.finfo(plain.dtype).eps,
    )
    assert ours <= allowed, f"error {ours:.2e}, allowed {allowed:.2e}"


def assert_same_function(found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """Assert that float32 outputs of a small network differ by at most `share` of the largest.

    Sums of up to a thousand terms in some tens of layers: sqrt(1000) * 30 * 6e-8 = 6e-5 where all
    rounding errors add up. A wrong weight, mean or activation is a hundred times as much.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=share * expected.abs().max().item())


def assert_same_levels(found: Tensor, expected: Tensor) -> None:
    """Assert that images of 256 levels in [0, 1] differ in few pixels, by one level."""
    apart = (found.double() - expected.double()).abs()
    assert apart.max() < 1.01 / 255 and (apart > 0).double().mean() < 0.01


def clearly_nearest(latents: Tensor, codebook: Tensor, margin: float = 1e-4) -> Tensor:
    """Return a mask [B, H, W] of latents [B, D, H, W] whose code rounding cannot change.

    Their second nearest entry is further away than the nearest by `margin` times the standard
    deviation of the latents.
    """
    rows = latents.double().permute(0, 2, 3, 1)  # [B, H, W, D]
    distances = (rows.unsqueeze(3) - codebook.double()).norm(dim=4)  # [B, H, W, K]
    nearest, second = distances.topk(2, largest=False).values.unbind(3)
    return second - nearest > margin * latents.double().std()
