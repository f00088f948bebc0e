"""What a store holds of a block of images, computed: the adversarial image's codes and pixels, and what the teacher says of them."""

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
    """All on the device. The stored image is 8-bit, and `outputs` and `kept` belong to exactly these pixels."""

    images: Tensor  # uint8 [B, 3, H, W]
    codes: Tensor | None  # int64 [B, h, w]; None where the discretizer has none
    outputs: Tensor  # float32 [B, C], the teacher's logits
    kept: Tensor  # bool [B], the teacher still says the label
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
    """The discrete adversarial images of `images` uint8 [B, 3, H, W] against `teacher`; labels, keys int64 [B]. See `perturb`.

    as_stored: what becomes of uint8 images on their way through the store.
    """
    x = to_pixels(images)
    base, perturbed = perturb(
        discretizer, teacher, attack, x, soft_targets(labels, num_classes), keys, order
    )
    found = discretizer(perturbed)
    levels = as_stored(to_levels(found.images))
    outputs = teacher(to_pixels(levels)).float()
    changed = None
    if found.codes is not None:
        before = discretizer(base).codes
        assert before is not None
        changed = (found.codes != before).float().flatten(1).mean(1)
    return Adversarial(levels, found.codes, outputs, keep_mask(outputs, labels).bool(), changed)
