"""Stored form of images: raw, lossless WebP or JPEG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dad_fast.cores import usable_cores
from dad_fast.errors import DataError, UsageError
from dad_fast.store.files import Bytes

T = TypeVar("T")


def check_images_form(form: str) -> None:
    """Raise UsageError unless `form` is `none`, `raw`, `webp` or `jpeg:Q`, 1 <= Q <= 100."""
    found = re.fullmatch(r"none|raw|webp|jpeg:([1-9]\d{0,2})", form)
    if not found or int(found[1] or 1) > 100:
        raise UsageError(
            f"images {form!r}: write none, raw, webp (lossless) or jpeg:Q "
            "with a quality from 1 to 100, such as jpeg:95"
        )


def encode_image(image: np.ndarray, form: str) -> Bytes:
    """Encode uint8 [H, W, 3]; a raw image is not copied.

    JPEG keeps the resolution of colours (4:4:4), since the attack changes colours too.
    """
    if form == "raw":
        return np.ascontiguousarray(image).reshape(-1).data
    file = io.BytesIO()
    if form == "webp":
        # Method 4 saves 4 % and takes three times as long.
        Image.fromarray(image).save(file, "WEBP", lossless=True, exact=True, method=2)
    else:
        quality = int(form.partition(":")[2])
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def encode_images(images: np.ndarray, form: str) -> list[Bytes]:
    """Encode uint8 [N, H, W, 3] with `encode_image`."""
    return on_all_cores(lambda image: encode_image(image, form), images, form)


def stored_files(images: np.ndarray | list[Bytes], form: str, readable: np.ndarray) -> list[Bytes]:
    """Return the stored bytes of n images, given as uint8 [n, H, W, 3] or encoded already.

    Images that are not `readable` get no bytes, or black pixels if raw. Raises ValueError for
    images in neither form.
    """
    if isinstance(images, list):
        if len(images) != len(readable) or form == "raw":
            raise ValueError(
                f"{len(images)} encoded images for a block of {len(readable)} in the form {form}"
            )
        return [image if ok else b"" for image, ok in zip(images, readable, strict=True)]
    if images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype}, not uint8")
    encoded = iter(encode_images(images[readable], form))
    blank = bytes(images[0].size) if form == "raw" else b""
    return [next(encoded) if ok else blank for ok in readable]


def on_all_cores(function: Callable[[Any], T], items: Iterable[Any], form: str) -> list[T]:
    """Return [function(item), …], in threads for encoded forms: the codecs release the GIL."""
    if form == "raw":
        return [function(item) for item in items]
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(function, items))


def decode_image(content: bytes, size: tuple[int, ...], name: str) -> np.ndarray:
    """Decode to uint8 [H, W, 3]. Raises DataError when it is not an image of that size."""
    try:
        with Image.open(io.BytesIO(content), formats=("WEBP", "JPEG")) as image:
            # Checked before the pixels are decoded.
            if image.size != (size[1], size[0]):
                raise DataError(
                    f"{name}: {image.size[0]}x{image.size[1]} pixels, "
                    f"{size[1]}x{size[0]} in the manifest"
                )
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not an image ({error}); verify the store") from error
