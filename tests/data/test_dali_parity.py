"""DALI executes records as PIL does.

Geometry to half a pixel, colours to the tolerances below, flips, crops and erasing exactly.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nvidia.dali")
pytest.importorskip("timm")
hypothesis = pytest.importorskip("hypothesis")

from dali_cases import FULL, by_dali, by_pil, decoded, errors, jpeg, photos, record_of

from dad_fast.data.augment.policy import ARGUMENTS, GEOMETRIC, Op
from dad_fast.data.augment.records import Erase, sample_record

st = hypothesis.strategies

LEVELS = (0.0, 3.3, 9.7)
# Levels of 255 over all pixels of the photos, all magnitudes and both signs: mean, 99th percentile,
# maximum.
EXACT = (0.0, 0, 0)
TOLERANCE = {
    **dict.fromkeys(
        ("brightness", "contrast", "invert", "posterize", "sharpness", "solarize", "solarize_add"),
        EXACT,
    ),
    # float32, where PIL has float64.
    "auto_contrast": (0.01, 0, 1),
    # The grey of a pixel in float32, where PIL has 16-bit integers.
    "color": (0.01, 0, 1),
    # PIL truncates the pixels per level to integers: much at 96 pixels, a level at 224.
    "equalize": (1.0, 10, 10),
    # A true Gaussian, where PIL runs three box filters.
    "gaussian_blur": (0.5, 4, 60),
    # DALI blends the border with the fill over one pixel; PIL does not.
    **dict.fromkeys(GEOMETRIC, (0.8, 15, 255)),
}
# Geometric operations of bicubic records, which DALI executes as bilinear.
BICUBIC = (1.5, 25, 255)
RESIZE = (0.3, 1, 20)


class Signed:
    def __init__(self, sign):
        self.sign = sign

    def signed(self, value):
        return self.sign * value

    def between(self, low, high):
        return (low + high) / 2


@pytest.fixture(scope="module")
def files():
    return photos()


def check(found, tolerance, what):
    mean, p99, most = tolerance
    seen = (found.mean(), np.percentile(found, 99), found.max())
    print(f"{what}: mean {seen[0]:.3f}, 99 % {seen[1]:.0f}, max {seen[2]}")
    assert seen[0] <= mean and seen[1] <= p99 and seen[2] <= most, (
        f"{what}: {seen} above {tolerance}"
    )


def every_argument(name):
    op, argument = ARGUMENTS[name]
    return op, sorted({argument(level, Signed(sign)) for level in LEVELS for sign in (1, -1)})


def sides(name):
    op, values = every_argument(name)
    return [
        Op(op, value, filter_name)
        for filter_name in (("bilinear", "bicubic") if op in GEOMETRIC else ("",))
        for value in values
    ]


@pytest.fixture(scope="module")
def colours(files):
    """Return the errors of every operation, from one batch: {operation: int [n, S, S, 3]}."""
    cases = [
        (data, op)
        for data in files
        for op in dict.fromkeys(op for name in ARGUMENTS for op in sides(name))
    ]
    records = [record_of(decoded(data), 96, crop=(40, 30, 96, 96), ops=(op,)) for data, op in cases]
    found = {}
    for (_, op), error in zip(cases, errors([data for data, _ in cases], records), strict=True):
        found.setdefault(op, []).append(error)
    return found


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_colours_of_each_operation(colours, name):
    for filter_name in {op.interpolation for op in sides(name)}:
        found = np.stack(
            [
                error
                for op in sides(name)
                if op.interpolation == filter_name
                for error in colours[op]
            ]
        )
        check(
            found,
            BICUBIC if filter_name == "bicubic" else TOLERANCE[ARGUMENTS[name][0]],
            f"{name} {filter_name}",
        )


def ruler(width, height, step):
    """Make an image with x in red and y in green, `step` levels a pixel, and constant blue."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * step, y * step, np.full_like(x, 220)], axis=-1).clip(0, 255).astype(np.uint8)
    )


def shift_in_pixels(datas, records, levels_per_pixel, device="cpu"):
    """Return the distances between DALI's and PIL's source positions, away from borders.

    A list of float [m, 2] (x and y), in output pixels.
    """
    ours, theirs = (
        by_dali(datas, records, device).astype(float),
        by_pil(datas, records).astype(float),
    )
    inside = (np.abs(theirs[..., 2] - 220) < 4) & (np.abs(ours[..., 2] - 220) < 4)
    inside[:, [0, -1], :] = inside[:, :, [0, -1]] = False
    shrunk = (
        inside[:, 1:-1, 1:-1]
        & inside[:, :-2, 1:-1]
        & inside[:, 2:, 1:-1]
        & inside[:, 1:-1, :-2]
        & inside[:, 1:-1, 2:]
    )
    assert shrunk.mean(axis=(1, 2)).min() > 0.3
    found = np.abs(ours - theirs)[:, 1:-1, 1:-1, :2] / levels_per_pixel
    return [errors[where] for errors, where in zip(found, shrunk, strict=True)]


def test_geometry_to_half_a_pixel():
    image = ruler(60, 60, 4)
    ops = [op for name in ARGUMENTS if ARGUMENTS[name][0] in GEOMETRIC for op in sides(name)]
    records = [record_of(image, 60, ops=(op,)) for op in ops]
    shifts = shift_in_pixels([jpeg(image, quality=100, subsampling=0)] * len(ops), records, 4)
    for op, shift in zip(ops, shifts, strict=True):
        assert shift.max() <= 0.5 and shift.mean() < 0.2, (op, shift.max(), shift.mean())


def test_geometry_of_crops_and_resizes():
    """Crops are at least as large as the output; smaller ones have less than a level per pixel."""
    image = ruler(240, 240, 1)
    crops = (
        (0, 0, 240, 240),
        (33, 44, 60, 60),
        (101, 7, 131, 211),
        (0, 0, 60, 240),
        (5, 3, 200, 61),
    )
    for interpolation in ("bilinear", "bicubic"):
        cases = [(crop, h, v) for crop in crops for h in (False, True) for v in (False, True)]
        records = [
            record_of(image, 60, crop=crop, interpolation=interpolation, hflip=h, vflip=v)
            for crop, h, v in cases
        ]
        shifts = shift_in_pixels([jpeg(image, quality=100, subsampling=0)] * len(cases), records, 1)
        for (crop, *_), levels in zip(cases, shifts, strict=True):
            pixels = levels / (np.array(crop[2:]) / 60)
            assert pixels.mean() < 0.25 and (pixels > 0.5).mean() < (
                0.01 if min(crop[2:]) > 120 else 0.25
            ), (crop, pixels.mean())


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_crops_are_resized_alike(files, interpolation):
    crops = (
        (0, 0, 400, 300),
        (7, 9, 224, 224),
        (100, 50, 60, 70),
        (3, 5, 390, 40),
        (60, 3, 17, 290),
    )
    cases = [(data, crop) for data in files for crop in crops]
    records = [
        record_of(decoded(data), 112, crop=crop, interpolation=interpolation)
        for data, crop in cases
    ]
    check(
        errors([data for data, _ in cases], records),
        EXACT if interpolation == "nearest" else RESIZE,
        interpolation,
    )


def test_decoding_crops_flips_and_erasing_are_exact(files):
    for data in files:
        image = decoded(data)
        records = [
            record_of(image, 112, crop=(left, 31, 112, 112), hflip=h, vflip=v, erase=erase)
            for left in (0, 7, 64)
            for h in (False, True)
            for v in (False, True)
            for erase in (
                None,
                *(Erase(13, 8, 50, 61, fill, 99) for fill in ("const", "rand", "pixel")),
                Erase(0, 0, 111, 3, "pixel", 7),
            )
        ]
        assert not errors([data] * len(records), records).any()


def test_kinds_of_jpeg_are_decoded_exactly(files):
    image = decoded(files[0])
    kinds = (
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"quality": 30},
        {"restart_marker_rows": 1},
    )
    datas = [jpeg(image, **options) for options in kinds]
    datas += [
        jpeg(image.convert("L"), **options) for options in kinds if "subsampling" not in options
    ]
    for left, top in ((0, 0), (33, 17), (544, 331)):
        assert not errors(
            datas, [record_of(image, 96, crop=(left, top, 96, 96))] * len(datas)
        ).any()


@hypothesis.given(
    seed=st.integers(0, 2**40),
    sample=st.integers(0, 2**31),
    img_size=st.sampled_from([33, 64, 112]),
)
@hypothesis.settings(max_examples=8, phases=[hypothesis.Phase.generate])
def test_random_records_match_pil(seed, sample, img_size):
    """A step at a threshold may turn one level into many, so the bound is on a whole picture."""
    aug = dataclasses.replace(
        FULL, aa="rand-m9-mstd1-inc1-n3", reprob=0.5, train_interpolation="bilinear"
    )
    files = photos() * 4
    records = [
        sample_record(aug, img_size, seed, 0, sample + row, *decoded(data).size)
        for row, data in enumerate(files)
    ]
    for record, found in zip(records, errors(files, records), strict=True):
        assert np.median(found) <= 4 and found.mean() < 12, (record, np.median(found), found.mean())


def test_smallest_images_match_pil(files):
    for img_size in (3, 4, 5):
        records = [sample_record(FULL, img_size, 0, 0, sample, 640, 427) for sample in range(40)]
        assert by_dali([files[0]] * 40, records).shape == (40, img_size, img_size, 3)
