"""DALI pipeline that executes records: JPEGs and numbers in, uint8 [S, S, 3] out, on CPU or GPU.

All random numbers come from the records: no DALI readers, no random operators. Decoding and
cropping give PIL's pixels (both use libjpeg-turbo with its accurate transform and smooth chroma);
the other operations differ from PIL's by the tolerances in tests/data/test_dali_parity.py. One
difference is not rounding: geometric operations are always bilinear, even for a record with
bicubic, since DALI's warp has no better filter. On photos this is half a level more on average, and
10 to 20 levels at the hundredth of the pixels that differ most.

The mixed back end (decoding on the GPU) has the same definition. It has not yet been run on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types

from dad_fast.data.augment.policy import FILL
from dad_fast.data.loaders.dali.plan import KIND

FILTER_TYPES = {
    "nearest": types.INTERP_NN,
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}
# Share of the range that turns rounding into truncation.
_DOWN = -0.49999 / 255
_LUMA = (0.299, 0.587, 0.114)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH


@pipeline_def(enable_conditionals=True)
def augment(img_size: int, num_ops: int, erases: bool, device: str, hints: dict[str, Any]) -> Any:
    """Define the pipeline.

    Args:
        num_ops: maximum number of operations of a record.
        erases: whether any record erases a box.
        device: of the decoder: "cpu" or "mixed".
        hints: further arguments of a mixed decoder.
    """

    def number(name: str, ndim: int, dtype: Any = types.INT32) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    files = fn.external_source(name="files", dtype=types.UINT8, ndim=1, no_copy=True)
    images = fn.decoders.image_slice(
        files,
        start=number("start", 1),
        shape=number("shape", 1),
        axis_names="WH",
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        use_fast_idct=False,
        **hints,
    )
    filters = fn.reinterpret(number("filter", 0), dtype=types.INTERP_TYPE)
    images = fn.resize(images, size=[img_size, img_size], interp_type=filters, antialias=True)
    images = fn.flip(images, horizontal=number("hflip", 0), vertical=number("vflip", 0))
    for slot in range(num_ops):
        images = _operation(
            images, number(f"kind{slot}", 0), number(f"value{slot}", 1, types.FLOAT), img_size
        )
    if erases:
        box = number("box", 1)
        patch = fn.external_source(
            name="patch", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True
        )
        if device == "mixed":
            patch = patch.gpu()
        images = _erased(images, box, patch, img_size)
    return images


def _operation(images: Any, kind: Any, value: Any, side: int) -> Any:
    """Apply one operation of the records; `kind` selects it per sample."""
    if kind == 0:
        found = images
    elif kind == KIND["geometry"]:
        found = _geometry(images, value, side)
    elif kind == KIND["table"]:
        found = _lookup(images, value)
    elif kind == KIND["brightness"]:
        found = _to_bytes(images, value[0])
    elif kind == KIND["contrast"]:
        found = _contrast(images, value[0])
    elif kind == KIND["color"]:
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        found = _blend(grey, images, value[0])
    elif kind == KIND["auto_contrast"]:
        found = _auto_contrast(images)
    elif kind == KIND["equalize"]:
        found = _equalize(images)
    elif kind == KIND["sharpness"]:
        found = _sharpness(images, value[0], side)
    else:
        found = fn.gaussian_blur(images, sigma=value[0])
    return found


def _to_bytes(images: Any, factor: Any = 1.0) -> Any:
    """Return factor * images as bytes as PIL does: clipped, then truncated.

    The fastest of DALI's operations that do this, by far.
    """
    return fn.brightness_contrast(
        images, brightness=factor, brightness_shift=_DOWN, dtype=types.UINT8
    )


def _blend(degenerate: Any, images: Any, factor: Any) -> Any:
    base = fn.cast(degenerate, dtype=types.FLOAT)
    return _to_bytes(base + (images - base) * factor)


def _geometry(images: Any, matrix: Any, side: int) -> Any:
    """Warp the image.

    DALI's warp has one fill value for all channels, but it repeats the outermost pixels: a frame of
    one pixel gets the fill colour.
    """
    framed = fn.slice(
        images,
        [-1, -1],
        [side + 2, side + 2],
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=list(FILL),
    )
    return fn.warp_affine(
        framed,
        matrix=fn.reshape(matrix, shape=[2, 3]),
        size=[side, side],
        interp_type=types.INTERP_LINEAR,
    )


def _lookup(images: Any, value: Any) -> Any:
    """Apply solarize_add, solarize, invert or posterize, in bytes, which never overflow here."""
    numbers = fn.cast(value, dtype=types.UINT8)
    white = types.ScalarConstant(255, dtype=types.UINT8)
    added = images + numbers[0] * (images < types.ScalarConstant(128, dtype=types.UINT8))
    return (added ^ (white * (added > numbers[1])) ^ numbers[2]) & numbers[3]


def _contrast(images: Any, factor: Any) -> Any:
    luma = types.Constant(np.array(_LUMA, np.float32), device="cpu")
    mean = math.floor(fn.reductions.sum(fn.reductions.mean(images, axes=[0, 1]) * luma) + 0.5)
    return _blend(mean, images, factor)


def _auto_contrast(images: Any) -> Any:
    low = fn.cast(fn.reductions.min(images, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
    high = fn.cast(fn.reductions.max(images, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
    # A channel of one value stays as it is.
    flat = low >= high
    stretch = 255.0 / math.max(high - low, 1.0)
    scale = stretch * (1 - flat) + flat
    offset = low * stretch * (1 - flat)
    # 1e-3, since float32 falls short of whole numbers that PIL's float64 reaches.
    return _to_bytes(images * scale - offset + 1e-3)


def _equalize(images: Any) -> Any:
    """Equalize the negative.

    DALI's table (OpenCV's) counts the pixels up to a level, PIL's those below it, which is the same
    operation on the negative.
    """
    white = types.ScalarConstant(255, dtype=types.UINT8)
    return white - fn.equalize(white - images)


def _sharpness(images: Any, factor: Any, side: int) -> Any:
    """Blend with the smoothed image; PIL's filter leaves the outermost pixels unchanged."""
    smooth = fn.filter(images, types.Constant(_SMOOTH, device="cpu"), mode="valid")
    inner = fn.slice(images, [1, 1], [side - 2, side - 2], axes=[0, 1])
    outer = fn.erase(images, anchor=[1, 1], shape=[side - 2, side - 2], axes=[0, 1], fill_value=0)
    start = types.Constant(np.array([-1, -1], np.int32), device="cpu")
    return outer + _padded(_blend(smooth, inner, factor), start, side)


def _erased(images: Any, box: Any, patch: Any, side: int) -> Any:
    """Put the patch, drawn on the host as for PIL's loader, into the box."""
    if box[2] > 0:
        blank = fn.erase(
            images,
            anchor=fn.cast(box[0:2], dtype=types.FLOAT),
            shape=fn.cast(box[2:4], dtype=types.FLOAT),
            axes=[0, 1],
        )
        found = blank + _padded(patch, -box[0:2], side)
    else:
        found = images
    return found


def _padded(images: Any, start: Any, side: int) -> Any:
    """Pad with black, so that an addition inserts the image."""
    return fn.slice(
        images,
        start=start,
        shape=[side, side],
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=0,
    )
