"""Execution of augmentation records with PIL, and the evaluation transform.

The pixels equal those of timm's operations with the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dad_fast.data.augment.apply_pixmix import mix_pictures
from dad_fast.data.augment.apply_prime import average_prime
from dad_fast.data.augment.operations import FILTERS, apply
from dad_fast.data.augment.pixmix import PixMixed
from dad_fast.data.augment.policy import FILL, Branches
from dad_fast.data.augment.prime import PrimeChains
from dad_fast.data.augment.records import MEAN, STD, AugmentRecord, Erase
from dad_fast.errors import UsageError

# Largest resized image before its crop: 200 MB.
MOST_PIXELS = 1 << 26


def execute(record: AugmentRecord, image: Image.Image) -> np.ndarray:
    """Apply `record` to an RGB image of the record's size -> uint8 [img_size, img_size, 3]."""
    assert image.size == record.size
    left, top, width, height = record.crop
    if record.crop != (0, 0, *image.size):
        image = image.crop((left, top, left + width, top + height))
    side = record.img_size
    if image.size != (side, side):
        image = image.resize((side, side), FILTERS[record.interpolation])
    if record.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if record.vflip:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for op in record.ops:
        image = apply(op, image)
    if record.blend is not None:
        image = _BLENDS[type(record.blend)](image, record.blend)
    pixels = np.asarray(image)
    if record.erase is not None:
        top, left, height, width = record.erase[:4]
        pixels = pixels.copy()
        pixels[top : top + height, left : left + width] = erase_patch(record.erase)
    return pixels


def eval_transform(
    image: Image.Image,
    img_size: int,
    crop_pct: float,
    interpolation: str,
    squashed: bool = False,
) -> np.ndarray:
    """Resize and crop as timm does in evaluation -> uint8 [img_size, img_size, 3].

    The shorter side becomes floor(img_size / crop_pct), or with `squashed` both sides (timm's
    crop_mode "squash"); the crop is the centre. crop_pct above 1 pads with black.
    """
    if interpolation not in FILTERS:
        raise UsageError(
            f"--interpolation {interpolation}: not a filter; choose from {', '.join(FILTERS)}"
        )
    if not squashed:
        image = _cut_far_ends(image, math.floor(img_size / crop_pct))
    size, (left, top) = eval_size(image.width, image.height, img_size, crop_pct, squashed)
    if size != image.size:
        image = image.resize(size, FILTERS[interpolation])
    if size != (img_size, img_size):
        image = image.crop((left, top, left + img_size, top + img_size))
    return np.asarray(image)


def _cut_far_ends(image: Image.Image, side: int) -> Image.Image:
    """Keep the middle of a very long image, so that resizing it to `side` needs little memory.

    The centre crop lies in that middle.
    """
    short, long = sorted(image.size)
    kept = max(short, MOST_PIXELS * short // side**2)
    if long <= kept:
        return image
    start = (long - kept) // 2
    if image.width == long:
        return image.crop((start, 0, start + kept, short))
    return image.crop((0, start, short, start + kept))


def eval_size(
    width: int, height: int, img_size: int, crop_pct: float, squashed: bool = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (width, height) after resizing and (left, top) of the crop of `eval_transform`."""
    short = math.floor(img_size / crop_pct)
    if squashed:
        size = (short, short)
    elif width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    left, top = (_crop_start(side, img_size) for side in size)
    return size, (left, top)


def _crop_start(side: int, crop: int) -> int:
    """Return the start of a centre crop as torchvision rounds it; negative where it pads."""
    return round((side - crop) / 2.0) if side >= crop else -((crop - side) // 2)


def erase_patch(erase: Erase) -> np.ndarray:
    """Make the pixels of an erased box: uint8 [height, width, 3]."""
    shape = (erase.height, erase.width, 3)
    if erase.fill == "const":
        return np.broadcast_to(np.array(FILL, np.uint8), shape)

    bits = np.random.Philox(key=np.array([erase.seed, 1], dtype=np.uint64))
    noise_shape = shape if erase.fill == "pixel" else (3,)
    noise = np.random.Generator(bits).standard_normal(noise_shape, dtype=np.float32)
    colour = np.asarray(MEAN, np.float32) + np.asarray(STD, np.float32) * noise
    levels = np.rint(colour.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return np.broadcast_to(levels, shape)


def _averaged(image: Image.Image, branches: Branches) -> Image.Image:
    """Blend the image with the average of its chains, in float32, truncated, as timm does."""
    average = np.zeros((image.height, image.width, 3), np.float32)
    for weight, chain in zip(branches.weights, branches.chains, strict=True):
        branch = image
        for op in chain:
            branch = apply(op, branch)
        average += np.float32(weight) * np.asarray(branch, np.float32)
    levels = average.clip(0, 255).astype(np.uint8)
    return Image.blend(image, Image.fromarray(levels), float(np.float32(branches.share)))


_BLENDS: dict[type, Callable[[Image.Image, Any], Image.Image]] = {
    Branches: _averaged,
    PixMixed: mix_pictures,
    PrimeChains: average_prime,
}
