"""Sampler of augmentations: (seed, epoch, sample) -> a record of numbers, which loaders execute.

Semantics and ranges are timm's (RandomResizedCrop, flips, policies, colour jitter, random
erasing); the order is crop, flips, colour and geometry, erasing. A record holds final arguments
(degrees, bits, a box in pixels), not magnitudes, so that both PIL and DALI can execute it. Pixels
that no image covers are filled with FILL, the ImageNet mean.

Own code: no library emits parameters that two back ends can replay per (seed, epoch, sample).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.policies import Blend, Sampled, parse_policy, uses_color_jitter
from dad_fast.data.augment.policy import Op
from dad_fast.keyed_random import ERASE, MIX, RECORD, Draws, raw_bits

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

NO_MIX, MIXUP, CUTMIX = range(3)


class Erase(NamedTuple):
    """A box in output pixels to fill with FILL (const), one colour (rand) or noise (pixel).

    Colour and noise are drawn from N(MEAN, STD), clipped to [0, 1].
    """

    top: int
    left: int
    height: int
    width: int
    fill: str
    seed: int


@dataclass(frozen=True, slots=True)
class AugmentRecord:
    """Augmentation of one sample in one epoch.

    `size` is the source's (width, height); `crop` is (left, top, width, height) in source pixels,
    resized to `img_size` squared with `interpolation`; `ops` follow in order, on the square image,
    then `blend`.
    """

    epoch: int
    sample: int
    size: tuple[int, int]
    img_size: int
    crop: tuple[int, int, int, int]
    interpolation: str
    hflip: bool
    vflip: bool
    ops: tuple[Op, ...]
    erase: Erase | None
    blend: Blend | None = None


class Mix(NamedTuple):
    """Mix of two neighbours of the epoch order.

    `lam` is the share of the own image; `box` (y0, y1, x0, x1) comes from the other image.
    """

    kind: int
    lam: float
    box: tuple[int, int, int, int]


UNMIXED = Mix(NO_MIX, 1.0, (0, 0, 0, 0))


def sample_record(
    aug: AugmentConfig, img_size: int, seed: int, epoch: int, sample: int, width: int, height: int
) -> AugmentRecord:
    """Return the record of one sample in one epoch; a pure function.

    Raises UsageError when `aug.aa` is not a policy.
    """
    draws = Draws(seed, RECORD, epoch, sample)
    random_filter = aug.train_interpolation == "random"

    if aug.crop == "center":
        side = min(width, height)
        crop = ((width - side) // 2, (height - side) // 2, side, side)
    elif aug.crop == "squash":
        crop = (0, 0, width, height)
    else:
        crop = _random_resized_crop(draws, aug.scale, aug.ratio, width, height)

    interpolation = aug.train_interpolation
    if random_filter:
        # Without a random crop or a resize nothing is drawn; timm then takes bilinear.
        drawn = aug.crop == "random-resized" and crop[2:] != (img_size, img_size)
        interpolation = ("bilinear", "bicubic")[draws.below(2)] if drawn else "bilinear"

    hflip = draws.chance(aug.hflip)
    vflip = draws.chance(aug.vflip)
    found = Sampled()
    if aug.aa:
        op_filter = "" if random_filter else aug.train_interpolation
        found = parse_policy(aug.aa, aug.pixmix_pictures).sample(draws, op_filter, img_size)
    ops = found.ops
    if uses_color_jitter(aug):
        ops += _color_jitter(draws, aug.color_jitter)

    erase = None
    if draws.chance(aug.reprob):
        erase = _erase_box(draws, img_size, aug.remode, seed, epoch, sample)
    size = width, height
    flips = hflip, vflip
    return AugmentRecord(
        epoch, sample, size, img_size, crop, interpolation, *flips, ops, erase, found.blend
    )


def mix_record(aug: AugmentConfig, img_size: int, seed: int, epoch: int, pair: int) -> Mix:
    """Return the mix of positions 2*pair and 2*pair+1 of the global epoch order.

    CutMix's `lam` is that of the box inside the image.
    """
    if not uses_mixing(aug):
        return UNMIXED
    draws = Draws(seed, MIX, epoch, pair)
    if not draws.chance(aug.mixup_prob):
        return UNMIXED
    if aug.cutmix > 0 and (aug.mixup <= 0 or draws.chance(aug.mixup_switch_prob)):
        side = int(img_size * math.sqrt(1.0 - draws.beta(aug.cutmix)))
        y, x = draws.below(img_size), draws.below(img_size)
        y0, y1 = max(0, y - side // 2), min(img_size, y + (side + 1) // 2)
        x0, x1 = max(0, x - side // 2), min(img_size, x + (side + 1) // 2)
        own_share = 1.0 - (y1 - y0) * (x1 - x0) / float(img_size * img_size)
        return Mix(CUTMIX, own_share, (y0, y1, x0, x1))
    return Mix(MIXUP, draws.beta(aug.mixup), (0, 0, 0, 0))


def uses_mixing(aug: AugmentConfig) -> bool:
    return aug.mixup_prob > 0 and (aug.mixup > 0 or aug.cutmix > 0)


def _random_resized_crop(
    draws: Draws, scale: tuple[float, float], ratio: tuple[float, float], width: int, height: int
) -> tuple[int, int, int, int]:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = draws.between(*scale) * width * height
        aspect = math.exp(draws.between(low, high))
        # At least one pixel: timm's 0-pixel crops of tiny images fail later.
        w = max(1, round(math.sqrt(area * aspect)))
        h = max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            top = draws.below(height - h + 1)
            return draws.below(width - w + 1), top, w, h

    if width / height < ratio[0]:
        w, h = width, max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w, h = max(1, round(height * ratio[1])), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def _color_jitter(draws: Draws, strength: float) -> tuple[Op, ...]:
    """Draw torchvision's ColorJitter: brightness, contrast and saturation in random order, no hue.

    All three share one strength.
    """
    names = ["brightness", "contrast", "color"]
    ops = []
    while names:
        name = names.pop(draws.below(len(names)))
        ops.append(Op(name, draws.between(max(0.0, 1.0 - strength), 1.0 + strength), ""))
    return tuple(ops)


def _erase_box(
    draws: Draws, img_size: int, fill: str, seed: int, epoch: int, sample: int
) -> Erase | None:
    """Draw timm's box: 2 % to a third of the area, aspect 0.3 to 1/0.3, inside the image.

    Returns None when ten attempts find no box.
    """
    low = math.log(0.3)
    for _ in range(10):
        area = draws.between(0.02, 1.0 / 3.0) * img_size * img_size
        aspect = math.exp(draws.between(low, -low))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < img_size and w < img_size:
            top, left = draws.below(img_size - h + 1), draws.below(img_size - w + 1)
            noise_seed = int(raw_bits(seed, ERASE, epoch, sample, 1)[0]) >> 1
            return Erase(top, left, h, w, fill, noise_seed)
    return None
