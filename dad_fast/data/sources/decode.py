"""Decoding of a file to an 8-bit RGB image with PIL, as timm does it.

EXIF rotation is ignored. Greyscale, palette, CMYK and alpha go through PIL's `convert("RGB")`
(alpha is dropped, not blended). One deliberate difference from timm: `convert` alone would clip
deep greyscale. 16-bit greyscale is scaled by taking the high byte, as PIL itself does for 16-bit
RGB; floats in [0, 1] are scaled by 255.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from dad_fast.data.sources.names import shown
from dad_fast.errors import DataError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
EXTENSIONS = (*_JPEG, ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
# Pillow detects forty more by content; for EPS it starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class DecodeError(DataError):
    """An image cannot be read; the message names it."""


@contextmanager
def open_image(file: str | Path | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image without reading its pixels.

    Opens regular files only: a pipe would block, and opening a device can have side effects. Raises
    PIL's errors; `reason` puts them into words.
    """
    if isinstance(file, (str, Path)) and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("not a regular file")
    with Image.open(file, formats=FORMATS) as image:
        yield image


def read_rgb(file: str | Path | IO[bytes], name: str = "") -> Image.Image:
    """Decode an image to RGB, 8 bits. `name` stands for the file in errors.

    Raises DecodeError for any damage.
    """
    try:
        with open_image(file) as image:
            return to_rgb(image)
    # PIL raises a dozen unrelated types for damaged files, SyntaxError and struct.error among them.
    except Exception as error:
        raise DecodeError(f"{name or shown(str(file))}: {reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a decoded copy in mode RGB. Raises ValueError for grey values without a known range.

    Floats are levels in [0, 1]; integers are levels of 8 bits, or of 16 if any exceeds 255.
    """
    if is_deep(image):
        values = np.asarray(image)  # uint16, int32 or float32
        low, high = values.min(initial=0), values.max(initial=0)
        if image.mode == "F":
            if not (low >= 0 and high <= 1):
                raise ValueError(f"float values from {low:g} to {high:g} are not in [0, 1]")
            values = np.rint(values * 255)
        elif low < 0:
            raise ValueError(f"negative values, down to {low}")
        # Mode "I" also holds 8-bit values.
        elif image.mode != "I" or high > 255:
            values = values >> 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image.copy() if getattr(image, "is_animated", False) else image
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Return whether an image is grey with integers of more than 8 bits or with floats."""
    return image.mode == "F" or image.mode.startswith("I")


# Ends the format of 16-bit grey images that use at most 12 bits, which may come from a 12-bit
# sensor: as 16-bit values they are nearly black.
FEW_BITS = "of at most 12 bits"


# The `image_format` of JPEGs that every decoder reads alike.
PLAIN_JPEG = "JPEG"


def image_format(image: Image.Image) -> str:
    """Return the format and colour mode of an opened image, such as "PNG RGBA".

    JPEGs in grey or YCbCr are PLAIN_JPEG.
    """
    if _is_plain_jpeg(image):
        return PLAIN_JPEG
    stored = "stored as RGB" if image.format == "JPEG" and image.mode == "RGB" else image.mode
    return f"{image.format} {stored}"


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Return whether an image is a JPEG in grey or YCbCr.

    CMYK is not plain, nor are colours stored as RGB, which some decoders take for YCbCr. The test
    for RGB is libjpeg's: an Adobe marker, or the component names R, G, B without a JFIF marker.
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    if image.mode == "L" or "jfif" in image.info:
        return True
    if "adobe_transform" in image.info:
        return image.info["adobe_transform"] == 1
    return [part[0] for part in getattr(image, "layer", ())] != [*b"RGB"]


def read_unchanged(path: str | Path, size: int) -> bytes | None:
    """Return a regular file's content, or None when it cannot be read or has another size."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != size:
                return None
            content = file.read()
    except OSError:
        return None
    return content if len(content) == size else None


def reason(error: Exception) -> str:
    """Describe in a few words, without the path, why an image was refused."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than the safe limit of {2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = str(error).splitlines()[0] if str(error) else ""
    return shown(text) or type(error).__name__
