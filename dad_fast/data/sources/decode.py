"""From a file's bytes to an 8-bit RGB image, with PIL, as timm does it; reported numbers are decoded here.

EXIF rotation is ignored. Greyscale, palette, CMYK and alpha go through PIL's `convert("RGB")` (alpha is dropped, not blended).
One deliberate difference from timm: 16-bit greyscale is scaled by taking the high byte, as PIL itself does for 16-bit RGB;
`convert` alone would clip everything above 255 to white.
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

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # Pillow knows forty more, by content; for EPS it starts Ghostscript


class DecodeError(DataError):
    """One image cannot be read; the message names it."""


@contextmanager
def open_image(file: str | Path | IO[bytes]) -> Iterator[Image.Image]:
    """An image whose pixels are not read yet. Only a regular file is opened: a pipe would be waited for, a device be acted on.

    Raises whatever PIL raises; `reason` says it in words.
    """
    if isinstance(file, (str, Path)) and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("not a regular file")
    with Image.open(file, formats=FORMATS) as image:
        yield image


def read_rgb(file: str | Path | IO[bytes], name: str = "") -> Image.Image:
    """Decode an image to RGB, 8 bits. `name` stands for the file in errors. Raises DecodeError whatever is wrong with it."""
    try:
        with open_image(file) as image:
            return to_rgb(image)
    except Exception as error:  # PIL raises a dozen unrelated types for damaged files, SyntaxError and struct.error among them
        raise DecodeError(f"{name or shown(str(file))}: {reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded copy in mode RGB."""
    if image.mode.startswith("I"):
        values = np.asarray(image)  # uint16 or int32
        if image.mode != "I" or values.max(initial=0) > 255:  # mode "I" also holds 8-bit values
            values = values >> 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image.copy() if getattr(image, "is_animated", False) else image
    return image.convert("RGB")


PLAIN_JPEG = "JPEG"  # the `image_format` of JPEGs that every decoder shows alike


def image_format(image: Image.Image) -> str:
    """The format of an opened image and how it keeps colours, such as "PNG RGBA"; PLAIN_JPEG for JPEGs in grey or YCbCr."""
    if _is_plain_jpeg(image):
        return PLAIN_JPEG
    stored = "stored as RGB" if image.format == "JPEG" and image.mode == "RGB" else image.mode
    return f"{image.format} {stored}"


def _is_plain_jpeg(image: Image.Image) -> bool:
    """CMYK is not plain, nor are colours stored as RGB, which some decoders take for YCbCr. The test for those is libjpeg's: an Adobe
    marker, or the letters R, G, B for components where no JFIF marker is.
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    if image.mode == "L" or "jfif" in image.info:
        return True
    if "adobe_transform" in image.info:
        return image.info["adobe_transform"] == 1
    return [part[0] for part in getattr(image, "layer", ())] != [*b"RGB"]


def read_unchanged(path: str | Path, size: int) -> bytes | None:
    """A regular file's content; None when it cannot be read or has not this size."""
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
    """Why an image was refused, in a few words that do not repeat its path."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than the safe limit of {2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = str(error).splitlines()[0] if str(error) else ""
    return shown(text) or type(error).__name__
