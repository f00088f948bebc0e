"""Adversarial images of a block for a store: codes and pixels, and the teacher's logits on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dad_fast.data.augment.mixing import soft_targets, to_levels, to_pixels
from dad_fast.discretizers.base import Discretizer
from dad_fast.methods.attack import PGD, perturb
from dad_fast.methods.losses import keep_mask


class Adversarial(NamedTuple):
    """Adversarial images on the device. `outputs` and `kept` belong to these 8-bit pixels."""

    images: Tensor  # uint8 [B, 3, H, W]
    codes: Tensor | None  # int64 [B, h, w]; None when the discretizer has no codes
    outputs: Tensor  # float32 [B, C], the teacher's logits
    kept: Tensor  # bool [B], the teacher still predicts the label
    changed: Tensor | None  # float32 [B], share of codes that the attack changed


@torch.no_grad()
def adversarial(
    teacher: Callable[[Tensor], Tensor],
    discretizer: Discretizer,
    attack: PGD,
    order: Literal["paper", "authors"],
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    num_classes: int,
    as_stored: Callable[[Tensor], Tensor] = lambda levels: levels,
) -> Adversarial:
    """Make discrete adversarial images of `images` uint8 [B, 3, H, W] against `teacher`.

    labels, keys: int64 [B], see `perturb`.
    as_stored: changes uint8 images as the store's encoding does.
    """
    pixels = to_pixels(images)
    targets = soft_targets(labels, num_classes)
    base, perturbed = perturb(discretizer, teacher, attack, pixels, targets, keys, order)
    found = discretizer(perturbed)
    levels = as_stored(to_levels(found.images))
    outputs = teacher(to_pixels(levels)).float()
    changed = None
    if found.codes is not None:
        before = discretizer(base).codes
        assert before is not None
        changed = (found.codes != before).float().flatten(1).mean(1)
    return Adversarial(levels, found.codes, outputs, keep_mask(outputs, labels).bool(), changed)
