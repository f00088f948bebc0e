"""From an image to its discrete adversarial image: attack, then the discretizer Q.

    paper:   Q(x + delta)            (arXiv 2311.01441, and DAT)
    authors: Q(Q(x) + delta)         (their code: a second VQGAN pass; delta starts from Q(x))

No gradient passes through Q (straight-through: the gradient at the image is used as it is).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dad_fast.discretizers.base import Discretized, Discretizer
from dad_fast.methods.attack import PGD


def perturb(
    discretizer: Discretizer,
    model: Callable[[Tensor], Tensor],
    attack: PGD,
    pixels: Tensor,
    targets: Tensor,
    keys: Tensor,
    order: Literal["paper", "authors"] = "paper",
) -> tuple[Tensor, Tensor]:
    """(base, base + delta), each [B, 3, H, W]: base is x (paper) or Q(x) (authors); arguments as in `PGD.__call__`."""
    with torch.no_grad():
        base = discretizer(pixels).images if order == "authors" else pixels
    return base, attack(model, base, targets, keys)


def discretize(
    discretizer: Discretizer,
    model: Callable[[Tensor], Tensor],
    attack: PGD,
    pixels: Tensor,
    targets: Tensor,
    keys: Tensor,
    order: Literal["paper", "authors"] = "paper",
) -> Discretized:
    """The discrete adversarial images of `pixels` [B, 3, H, W] against `model`; arguments as in `PGD.__call__`."""
    _, perturbed = perturb(discretizer, model, attack, pixels, targets, keys, order)
    with torch.no_grad():
        return discretizer(perturbed)
