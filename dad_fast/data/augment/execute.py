"""Carry out a record with PIL, and the evaluation transform. The pixels equal those of timm's own operations on the same arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dad_fast.data.augment.policy import Op
from dad_fast.data.augment.records import FILL, MEAN, STD, AugmentRecord, Erase
from dad_fast.errors import UsageError

MOST_PIXELS = 1 << 26  # of a resized image before it is cropped: 200 MB

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def execute(record: AugmentRecord, image: Image.Image) -> np.ndarray:
    """Apply `record` to its RGB image (whose size it was made for) -> uint8 [img_size, img_size, 3]."""
    assert image.size == record.size
    left, top, width, height = record.crop
    if record.crop != (0, 0, *image.size):
        image = image.crop((left, top, left + width, top + height))
    side = record.img_size
    if image.size != (side, side):
        image = image.resize((side, side), _FILTERS[record.interpolation])
    if record.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if record.vflip:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for op in record.ops:
        image = _OPS[op.name](image, op)
    pixels = np.asarray(image)
    if record.erase is not None:
        top, left, height, width = record.erase[:4]
        pixels = pixels.copy()
        pixels[top : top + height, left : left + width] = erase_patch(record.erase)
    return pixels


def eval_transform(
    image: Image.Image, img_size: int, crop_pct: float, interpolation: str
) -> np.ndarray:
    """timm's evaluation: shorter side to floor(img_size / crop_pct), centre crop -> uint8 [img_size, img_size, 3]."""
    if interpolation not in _FILTERS:
        raise UsageError(
            f"--interpolation {interpolation}: not a filter; choose from {', '.join(_FILTERS)}"
        )
    image = _without_far_ends(image, math.floor(img_size / crop_pct))
    size, (left, top) = eval_size(image.width, image.height, img_size, crop_pct)
    if size != image.size:
        image = image.resize(size, _FILTERS[interpolation])
    if size != (img_size, img_size):
        image = image.crop((left, top, left + img_size, top + img_size))
    return np.asarray(image)


def _without_far_ends(image: Image.Image, side: int) -> Image.Image:
    """The middle of an image so long that it would be enormous once its shorter side is `side`; what the crop shows is in it."""
    short, long = sorted(image.size)
    most = max(short, MOST_PIXELS * short // side**2)  # of the longer side
    if long <= most:
        return image
    start = (long - most) // 2
    return image.crop(
        (start, 0, start + most, short) if image.width == long else (0, start, short, start + most)
    )


def eval_size(
    width: int, height: int, img_size: int, crop_pct: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of `eval_transform`: width and height after resizing, left and top of the crop."""
    short = math.floor(img_size / crop_pct)
    size = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    return size, (round((size[0] - img_size) / 2.0), round((size[1] - img_size) / 2.0))


def erase_patch(erase: Erase) -> np.ndarray:
    """What fills an erased box: uint8 [height, width, 3]."""
    shape = (erase.height, erase.width, 3)
    if erase.fill == "const":
        return np.broadcast_to(np.array(FILL, np.uint8), shape)
    bits = np.random.Philox(key=np.array([erase.seed, 1], dtype=np.uint64))
    noise = np.random.Generator(bits).standard_normal(
        shape if erase.fill == "pixel" else (3,), dtype=np.float32
    )
    colour = np.asarray(MEAN, np.float32) + np.asarray(STD, np.float32) * noise
    return np.broadcast_to(np.rint(colour.clip(0.0, 1.0) * 255.0).astype(np.uint8), shape)


def affine_matrix(op: Op, side: int) -> tuple[float, ...]:
    """Of a geometric operation on a square image: (a, b, c, d, e, f) shows at (x, y) what was at (a*x + b*y + c, d*x + e*y + f).
    Coordinates in pixels, (0, 0) is the corner of the first one.
    """
    if op.name == "rotate":
        cos, sin, half = (
            math.cos(math.radians(op.value)),
            math.sin(math.radians(op.value)),
            side / 2.0,
        )
        return cos, -sin, half - cos * half + sin * half, sin, cos, half - sin * half - cos * half
    x_by_y = op.value if op.name == "shear_x" else 0.0
    y_by_x = op.value if op.name == "shear_y" else 0.0
    right = op.value * side if op.name == "translate_x" else 0.0
    down = op.value * side if op.name == "translate_y" else 0.0
    return 1.0, x_by_y, right, y_by_x, 1.0, down


def _affine(image: Image.Image, op: Op) -> Image.Image:
    matrix = affine_matrix(op, image.size[0])
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=_FILTERS[op.interpolation],
        fillcolor=FILL,
    )


def _posterize(image: Image.Image, op: Op) -> Image.Image:
    """Keep the highest bits; 0 bits is black, which timm's ranges ask for and ImageOps.posterize refuses since Pillow 13."""
    mask = 256 - (1 << (8 - int(op.value)))
    return image.point([value & mask for value in range(256)] * 3)


def _solarize_add(image: Image.Image, op: Op) -> Image.Image:
    table = [min(255, value + int(op.value)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


_OPS: dict[str, Callable[[Image.Image, Op], Image.Image]] = {
    "auto_contrast": lambda image, op: ImageOps.autocontrast(image),
    "equalize": lambda image, op: ImageOps.equalize(image),
    "invert": lambda image, op: ImageOps.invert(image),
    "rotate": lambda image, op: image.rotate(
        op.value, resample=_FILTERS[op.interpolation], fillcolor=FILL
    ),
    "shear_x": _affine,
    "shear_y": _affine,
    "translate_x": _affine,
    "translate_y": _affine,
    "posterize": _posterize,
    "solarize": lambda image, op: ImageOps.solarize(image, int(op.value)),
    "solarize_add": _solarize_add,
    "color": lambda image, op: ImageEnhance.Color(image).enhance(op.value),
    "contrast": lambda image, op: ImageEnhance.Contrast(image).enhance(op.value),
    "brightness": lambda image, op: ImageEnhance.Brightness(image).enhance(op.value),
    "sharpness": lambda image, op: ImageEnhance.Sharpness(image).enhance(op.value),
    "gaussian_blur": lambda image, op: image.filter(ImageFilter.GaussianBlur(radius=op.value)),
}
