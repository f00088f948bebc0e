"""Mixup and CutMix on the device, with the loader's parameters. No host synchronization.

Neighbours are partners: 0 with 1, 2 with 3, ... Both get the same share of the own image and the
same box, as in timm's "pair" mode. Shapes are static, for CUDA graphs.
Sources: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.data.augment.records import CUTMIX, MIXUP


class Mixed(NamedTuple):
    pixels: Tensor  # [B, 3, H, W], dtype of the input
    targets: Tensor  # float32 [B, C], rows sum to 1
    second_labels: Tensor  # int64 [B], the partner's label, or the own one of an unmixed image
    lam: Tensor  # float32 [B], share of the own image


def to_pixels(
    images: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Convert uint8 [B, 3, H, W] to float32 in [0, 1]."""
    return images.to(torch.float32, memory_format=memory_format).div_(255.0)


def to_levels(pixels: Tensor) -> Tensor:
    """Convert pixels in [0, 1] to uint8, rounded to nearest."""
    return pixels.mul(255.0).round_().clamp_(0, 255).to(torch.uint8)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Convert labels int64 [B] to float32 [B, C]: smoothing/C everywhere, the rest on the label."""
    targets = torch.full(
        (labels.shape[0], num_classes), smoothing / num_classes, device=labels.device
    )
    return targets.scatter_(1, labels.unsqueeze(1), 1.0 - smoothing + smoothing / num_classes)


def partners(batch_size: int, device: torch.device | str) -> Tensor:
    """Return each image's neighbour: int64 [B]. The last image of an odd batch is its own."""
    return (torch.arange(batch_size, device=device) ^ 1).clamp_(max=batch_size - 1)


def mix(
    pixels: Tensor,
    labels: Tensor,
    kind: Tensor,
    lam: Tensor,
    box: Tensor,
    num_classes: int,
    smoothing: float = 0.0,
    others: Tensor | None = None,
) -> Mixed:
    """Mix a batch with its neighbours and smooth its labels.

    Args:
        pixels: [B, 3, H, W], B even (an odd B is allowed where nothing is mixed).
        labels: int64 [B].
        kind, lam, box: of a Batch: int64 [B] (0 none, 1 mixup, 2 CutMix), float32 [B], and
            int64 [B, 4] as y0, y1, x0, x1.
        others: [B, 3, H, W], other images of the same samples from which the partners are taken;
            `pixels` itself by default.

    Returns:
        Mixed: `pixels` = own * share + partner * (1 - share), exact where the share is 0 or 1.
    """
    batch, _, height, width = pixels.shape
    partner = partners(batch, pixels.device)

    y0, y1, x0, x1 = box.unbind(1)
    rows = torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device)
    inside_y = (rows >= y0[:, None]) & (rows < y1[:, None])  # [B, H]
    inside_x = (columns >= x0[:, None]) & (columns < x1[:, None])  # [B, W]
    own = ~(inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(1)  # [B, 1, H, W]

    kind, share = kind.view(-1, 1, 1, 1), lam.view(-1, 1, 1, 1)
    blended = torch.where(kind == MIXUP, share, 1.0).to(pixels.dtype)
    weight = torch.where(kind == CUTMIX, own.to(pixels.dtype), blended)
    partner_pixels = (pixels if others is None else others)[partner]
    mixed = pixels * weight + partner_pixels * (1.0 - weight)

    targets = soft_targets(labels, num_classes, smoothing)
    targets = targets * lam[:, None] + targets[partner] * (1.0 - lam[:, None])
    second = torch.where(kind.view(-1) > 0, labels[partner], labels)
    return Mixed(mixed, targets, second, lam)
