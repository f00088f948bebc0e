"""Operations of augmentation policies on PIL images.

The pixels equal those of timm's operations with the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dad_fast.data.augment.policy import FILL, Op

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def apply(op: Op, image: Image.Image) -> Image.Image:
    """Apply one operation to a square RGB image."""
    return _OPS[op.name](image, op)


def affine_matrix(op: Op, side: int) -> tuple[float, ...]:
    """Return (a, b, c, d, e, f) of a geometric operation on a square image.

    The output at (x, y) is the input at (a*x + b*y + c, d*x + e*y + f). Coordinates are in pixels;
    (0, 0) is the corner of the first pixel.
    """
    if op.name == "rotate":
        angle = math.radians(op.value)
        cos, sin = math.cos(angle), math.sin(angle)
        half = side / 2.0
        right = half - cos * half + sin * half
        down = half - sin * half - cos * half
        return cos, -sin, right, sin, cos, down
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
        resample=FILTERS[op.interpolation],
        fillcolor=FILL,
    )


def _posterize(image: Image.Image, op: Op) -> Image.Image:
    """Keep the highest bits; 0 bits is black.

    timm's ranges include 0 bits, which ImageOps.posterize refuses since Pillow 13.
    """
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
        op.value, resample=FILTERS[op.interpolation], fillcolor=FILL
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
