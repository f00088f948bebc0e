"""Execution of PixMix's records, in float32 between the rounds as in the authors' code."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dad_fast.data.augment.fractals import SIDE, fractal
from dad_fast.data.augment.operations import apply
from dad_fast.data.augment.pixmix import Picture, PixMixed, Round, unreadable
from dad_fast.data.sources.decode import open_image, to_rgb

# Share of a picture's shorter side that is cropped: 224 of 256 pixels.
CROP = 224 / 256
# Keeps powers of black finite, as in the authors' code.
_LEAST = 1e-37


def mix_pictures(image: Image.Image, blend: PixMixed) -> Image.Image:
    """Mix a square RGB image with its picture and with itself."""
    start = apply(blend.first, image) if blend.first else image
    if not blend.rounds:
        return start
    needs_picture = any(turn.op is None for turn in blend.rounds)
    picture = render(blend.picture, image.width) if needs_picture else image
    mixed = np.asarray(start, np.float32) / np.float32(255.0)
    for turn in blend.rounds:
        other = np.asarray(apply(turn.op, image) if turn.op else picture)
        mixed = _mix(mixed, other, turn).clip(0.0, 1.0)
    return Image.fromarray(np.rint(mixed * 255.0).astype(np.uint8))


def _mix(mixed: np.ndarray, other: np.ndarray, turn: Round) -> np.ndarray:
    """Add in [-1, 1], or multiply powers in [0, 2]. `mixed` in [0, 1], `other` in 0 … 255."""
    own, weight = np.float32(turn.own), np.float32(turn.other)
    levels = np.arange(256, dtype=np.float32) / np.float32(255.0)
    if turn.kind == "add":
        # ((2x - 1) own + (2y - 1) weight + 1) / 2; the part of y from a table of 256 levels.
        table = levels * weight + (1.0 - own - weight) / 2.0
        return mixed * own + table[other]
    table = np.power((2.0 * levels).clip(_LEAST), weight) / np.float32(2.0)
    return np.power(2.0 * mixed, own) * table[other]


def render(picture: Picture, side: int) -> Image.Image:
    """Make the picture's crop as an RGB image [side, side].

    Raises DataError for a file that cannot be read.
    """
    if picture.file:
        return _read(picture, side)
    grey = Image.fromarray(fractal(picture.fractal))
    left, top = (share * SIDE * (1 - CROP) for share in (picture.left, picture.top))
    box = left, top, left + SIDE * CROP, top + SIDE * CROP
    grey = grey.resize((side, side), Image.Resampling.BILINEAR, box)
    anchors = np.linspace(0, 255, len(picture.colours))
    tables = [
        np.interp(np.arange(256), anchors, channel)
        for channel in zip(*picture.colours, strict=True)
    ]
    colours = [np.rint(table).astype(np.uint8).tolist() for table in tables]
    return Image.merge("RGB", [grey.point(table) for table in colours])


def _read(picture: Picture, side: int) -> Image.Image:
    shorter = round(side / CROP)
    try:
        with open_image(picture.file) as opened:
            # A JPEG is decoded at a smaller size where that is enough.
            opened.draft("RGB", (shorter, shorter))
            image = to_rgb(opened)
    except Exception as error:  # PIL's many types, see decode.py
        raise unreadable(picture.file, error) from error
    crop = min(image.size) * CROP
    left, top = picture.left * (image.width - crop), picture.top * (image.height - crop)
    box = left, top, left + crop, top + crop
    return image.resize((side, side), Image.Resampling.BILINEAR, box)
