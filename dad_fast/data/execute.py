"""Carry out a record with PIL, and the evaluation transform. The pixels equal those of timm's own operations on the same arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dad_fast.data.policy import Op
from dad_fast.data.records import FILL, MEAN, STD, Erase, Record
from dad_fast.errors import UsageError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def execute(record: Record, image: Image.Image) -> np.ndarray:
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
        pixels = _erase(pixels.copy(), record.erase)
    return pixels


def eval_transform(image: Image.Image, img_size: int, crop_pct: float, interpolation: str) -> np.ndarray:
    """timm's evaluation: shorter side to floor(img_size / crop_pct), centre crop -> uint8 [img_size, img_size, 3]."""
    if interpolation not in _FILTERS:
        raise UsageError(f"--interpolation {interpolation}: not a filter; choose from {', '.join(_FILTERS)}")
    width, height = image.size
    short = math.floor(img_size / crop_pct)
    if width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    if size != image.size:
        image = image.resize(size, _FILTERS[interpolation])
    left, top = round((size[0] - img_size) / 2.0), round((size[1] - img_size) / 2.0)
    if size != (img_size, img_size):
        image = image.crop((left, top, left + img_size, top + img_size))
    return np.asarray(image)


def _erase(pixels: np.ndarray, erase: Erase) -> np.ndarray:
    box = (slice(erase.top, erase.top + erase.height), slice(erase.left, erase.left + erase.width))
    if erase.fill == "const":
        pixels[box] = FILL
        return pixels
    shape = (erase.height, erase.width, 3) if erase.fill == "pixel" else (3,)
    bits = np.random.Philox(key=np.array([erase.seed, 1], dtype=np.uint64))
    noise = np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
    colour = np.asarray(MEAN, np.float32) + np.asarray(STD, np.float32) * noise
    pixels[box] = np.rint(colour.clip(0.0, 1.0) * 255.0)
    return pixels


def _affine(image: Image.Image, op: Op, matrix: tuple[float, ...]) -> Image.Image:
    """`matrix` takes an output pixel to the input pixel it shows."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=_FILTERS[op.interpolation], fillcolor=FILL)


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
    "rotate": lambda image, op: image.rotate(op.value, resample=_FILTERS[op.interpolation], fillcolor=FILL),
    "shear_x": lambda image, op: _affine(image, op, (1, op.value, 0, 0, 1, 0)),
    "shear_y": lambda image, op: _affine(image, op, (1, 0, 0, op.value, 1, 0)),
    "translate_x": lambda image, op: _affine(image, op, (1, 0, op.value * image.size[0], 0, 1, 0)),
    "translate_y": lambda image, op: _affine(image, op, (1, 0, 0, 0, 1, op.value * image.size[1])),
    "posterize": _posterize,
    "solarize": lambda image, op: ImageOps.solarize(image, int(op.value)),
    "solarize_add": _solarize_add,
    "color": lambda image, op: ImageEnhance.Color(image).enhance(op.value),
    "contrast": lambda image, op: ImageEnhance.Contrast(image).enhance(op.value),
    "brightness": lambda image, op: ImageEnhance.Brightness(image).enhance(op.value),
    "sharpness": lambda image, op: ImageEnhance.Sharpness(image).enhance(op.value),
    "gaussian_blur": lambda image, op: image.filter(ImageFilter.GaussianBlur(radius=op.value)),
}
