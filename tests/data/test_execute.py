"""Execution with PIL: pixels equal to timm's for the same arguments; decoding of all formats."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import eval_transform, execute
from dad_fast.data.augment.operations import apply
from dad_fast.data.augment.policies import TRIVIAL_ARGUMENTS, AutoAugment, parse_policy
from dad_fast.data.augment.policy import (
    ARGUMENTS,
    AUGMIX_ARGUMENTS,
    FILL,
    GEOMETRIC,
    Branches,
    Op,
)
from dad_fast.data.augment.records import AugmentRecord, Erase, sample_record
from dad_fast.data.sources.decode import DecodeError, read_rgb
from dad_fast.errors import UsageError


@pytest.fixture(scope="module")
def photo():
    """Load a real JPEG at a smaller size."""
    datasets = pytest.importorskip("sklearn.datasets")
    return Image.fromarray(datasets.load_sample_image("china.jpg")).resize((160, 107))


def plain(image, img_size, **changes):
    record = AugmentRecord(
        0, 0, image.size, img_size, (0, 0, *image.size), "bicubic", False, False, (), None
    )
    return dataclasses.replace(record, **changes)


MOVED = ("TranslateXRel", "TranslateYRel")


@pytest.mark.parametrize(
    ("name", "share"), [*((name, 0.45) for name in ARGUMENTS), *((name, 0.3) for name in MOVED)]
)
def test_operations_equal_timms(photo, name, share, monkeypatch):
    """share: of the side by which timm moves images, 0.3 in AugMix."""
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    monkeypatch.setattr(auto_augment.random, "uniform", lambda low, high: (low + high) / 2)
    image = photo.resize((64, 64))
    for sign in (1, -1):
        for level in (0.0, 3.3, 7.0, 9.7, 10.0):
            op, argument = (ARGUMENTS if share == 0.45 else AUGMIX_ARGUMENTS)[name]
            value = argument(level, _Sign(sign))
            filters = ("bilinear", "bicubic") if op in GEOMETRIC else ("",)
            for interpolation in filters:
                ours = execute(plain(image, 64, ops=(Op(op, value, interpolation),)), image)
                if op == "posterize" and value == 0:
                    assert not ours.any()  # timm means black; Pillow 13 refuses to
                    continue
                resample = {
                    "bilinear": Image.Resampling.BILINEAR,
                    "bicubic": Image.Resampling.BICUBIC,
                    "": None,
                }[interpolation]
                hparams = {"img_mean": FILL, "interpolation": resample, "translate_pct": share}
                theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)(
                    image
                )
                np.testing.assert_array_equal(
                    ours, np.asarray(theirs), err_msg=f"{name} {level} {interpolation}"
                )


class _Sign:
    def __init__(self, sign):
        self.sign = sign

    def signed(self, value):
        return self.sign * value

    def between(self, low, high):
        return (low + high) / 2


def test_every_policy_of_timm_is_covered():
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    for text in ("rand-m9", "rand-m9-inc1", "rand-m9-tweights", "rand-m9-t3a", "rand-m9-t3aw"):
        assert {op.name for op in parse_policy(text).ops} <= set(ARGUMENTS)
    assert {f"{i}" for i in auto_augment.rand_augment_choices("")} <= set(ARGUMENTS)
    for text in ("v0", "v0r", "original", "originalr", "3a"):
        policy = parse_policy(text)
        assert isinstance(policy, AutoAugment)
        assert {op.name for sub in policy.sub_policies for op in sub} <= set(ARGUMENTS)
    assert {op.name for op in parse_policy("augmix").ops} <= set(AUGMIX_ARGUMENTS)


def test_augmix_equals_timms(photo, monkeypatch):
    """timm's average of chains, with the draws and the operations of a record."""
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    image = photo.resize((64, 64))
    chains = (
        (Op("shear_x", 0.2, "bilinear"), Op("posterize", 3, "")),
        (Op("equalize", 0.0, ""),),
        (Op("color", 1.7, ""), Op("rotate", 12.5, "bicubic"), Op("solarize", 90, "")),
    )
    weights, share = (0.17, 0.51, 0.32), 0.643
    record = plain(image, 64, blend=Branches(chains, weights, share))

    waiting = [[lambda img, op=op: apply(op, img) for op in chain] for chain in chains]
    draws = auto_augment.np.random
    monkeypatch.setattr(draws, "choice", lambda *_, **__: waiting.pop(0))
    monkeypatch.setattr(draws, "dirichlet", lambda alphas: weights)
    monkeypatch.setattr(draws, "beta", lambda *_: share)
    theirs = auto_augment.AugMixAugment(ops=[], width=3)(image)
    np.testing.assert_array_equal(execute(record, image), np.asarray(theirs))


@pytest.mark.parametrize("name", list(TRIVIAL_ARGUMENTS))
def test_trivialaugment_equals_torchvisions(photo, name):
    """Every magnitude, except for rounding of torchvision's float32 magnitudes."""
    theirs = pytest.importorskip("torchvision.transforms.autoaugment")
    space = theirs.TrivialAugmentWide()._augmentation_space(31)
    assert set(space) == set(TRIVIAL_ARGUMENTS)
    magnitudes, is_signed = space[name]
    op, argument = TRIVIAL_ARGUMENTS[name]
    image = photo.resize((64, 64))
    modes = {mode.value: mode for mode in theirs.InterpolationMode}
    for bin in range(0, 31, 3):
        for sign in (1, -1) if is_signed else (1,):
            magnitude = float(magnitudes[bin]) if magnitudes.ndim else 0.0
            if op.startswith("translate"):
                # In float32 the middle of 0 … 32 is below 16, and would move by 15 pixels.
                magnitude = round(magnitude, 4)
            mode = "bicubic" if bin % 2 else "bilinear"
            arguments = {"interpolation": modes[mode], "fill": list(FILL)}
            expected = theirs._apply_op(image, name, sign * magnitude, **arguments)
            # torchvision moves the image, a record the place that is read.
            towards = -sign if op.startswith("translate") else sign
            value = argument(bin, _Sign(towards), 64)
            ops = () if op == "identity" else (Op(op, value, mode if op in GEOMETRIC else ""),)
            ours = execute(plain(image, 64, ops=ops), image).astype(int)
            difference = np.abs(ours - np.asarray(expected))
            assert difference.max() <= 1 and difference.mean() < 0.01, (bin, sign)


def test_jitter_equals_torchvisions(photo):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = photo.resize((32, 32))
    ours = execute(
        plain(
            image,
            32,
            ops=(Op("contrast", 0.7, ""), Op("color", 1.3, ""), Op("brightness", 1.2, "")),
        ),
        image,
    )
    theirs = functional.adjust_brightness(
        functional.adjust_saturation(functional.adjust_contrast(image, 0.7), 1.3), 1.2
    )
    np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_crop_and_flips_equal_torchvisions(photo):
    functional = pytest.importorskip("torchvision.transforms.functional")
    modes = pytest.importorskip("torchvision.transforms").InterpolationMode
    for interpolation, mode in (("bilinear", modes.BILINEAR), ("bicubic", modes.BICUBIC)):
        record = plain(
            photo, 48, crop=(20, 10, 77, 55), interpolation=interpolation, hflip=True, vflip=True
        )
        theirs = functional.vflip(
            functional.hflip(functional.resized_crop(photo, 10, 20, 55, 77, (48, 48), mode))
        )
        np.testing.assert_array_equal(execute(record, photo), np.asarray(theirs))


def test_erasing_fills_its_box_and_nothing_else(photo):
    image = photo.resize((64, 64))
    before = np.asarray(image)
    outside = np.ones((64, 64), bool)
    outside[10:40, 5:50] = False
    for fill in ("const", "rand", "pixel"):
        record = plain(image, 64, erase=Erase(10, 5, 30, 45, fill, 99))
        pixels = execute(record, image)
        np.testing.assert_array_equal(pixels[outside], before[outside])
        box = pixels[10:40, 5:50].reshape(-1, 3)
        if fill == "pixel":
            assert abs(box.mean(0) - np.array(FILL)).max() < 4 and box.std(0).min() > 45
        else:
            assert (box == box[0]).all() and ((box[0] == FILL).all() == (fill == "const"))
        np.testing.assert_array_equal(pixels, execute(record, image))
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize("size", [(1, 1), (6000, 1), (1, 300), (3, 5000)])
def test_extreme_sizes_are_executed(size):
    pytest.importorskip("timm")
    aug = AugmentConfig(aa="rand-m9-mstd0.5-inc1", reprob=1.0)
    image = Image.new("RGB", size, (10, 200, 30))
    for sample in range(10):
        pixels = execute(sample_record(aug, 16, 0, 0, sample, *size), image)
        assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert eval_transform(image, 16, 0.875, "bicubic").shape == (16, 16, 3)


@pytest.mark.parametrize("size", [(160, 107), (107, 160), (28, 28), (31, 33), (300, 301)])
@pytest.mark.parametrize(
    ("img_size", "crop_pct", "interpolation"),
    [
        (28, 1.0, "bicubic"),
        (32, 0.875, "bilinear"),
        (33, 0.9, "bicubic"),
        (32, 1.15, "bicubic"),
        (33, 1.5, "bilinear"),
    ],
)
def test_evaluation_equals_timms(photo, size, img_size, crop_pct, interpolation):
    factory = pytest.importorskip("timm.data.transforms_factory")
    image = photo.resize(size)
    theirs = factory.transforms_imagenet_eval(
        img_size, crop_pct, interpolation=interpolation, use_prefetcher=True
    )(image)
    np.testing.assert_array_equal(
        eval_transform(image, img_size, crop_pct, interpolation), theirs.permute(1, 2, 0).numpy()
    )


@pytest.mark.parametrize("size", [(60, 40), (37, 90), (32, 32)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
def test_squashed_evaluation_equals_timms(photo, size, crop_pct):
    factory = pytest.importorskip("timm.data.transforms_factory")
    image = photo.resize(size)
    theirs = factory.transforms_imagenet_eval(
        32, crop_pct, "squash", interpolation="bicubic", use_prefetcher=True
    )(image)
    ours = eval_transform(image, 32, crop_pct, "bicubic", squashed=True)
    np.testing.assert_array_equal(ours, theirs.permute(1, 2, 0).numpy())


def test_evaluation_filter_must_exist(photo):
    with pytest.raises(UsageError, match="--interpolation"):
        eval_transform(photo, 32, 0.9, "cubic")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_modes_become_rgb_as_timm_does(photo):
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        file = encoded(photo.convert(mode), kind)
        image = read_rgb(file)
        file.seek(0)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(
            np.asarray(image), np.asarray(Image.open(file).convert("RGB"))
        )


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    image = np.asarray(read_rgb(encoded(Image.fromarray(ramp), "PNG")))
    np.testing.assert_array_equal(image[..., 0], (ramp >> 8).astype(np.uint8))
    small = np.asarray(read_rgb(encoded(Image.fromarray((ramp >> 8).astype(np.int32)), "TIFF")))
    np.testing.assert_array_equal(small[..., 0], (ramp >> 8).astype(np.uint8))


def test_exif_rotation_is_ignored(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_rgb(encoded(photo, "JPEG", exif=exif)).size == photo.size


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = read_rgb(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.size == (8, 8) and image.getpixel((3, 3)) == (255, 0, 0)


def test_errors_of_damaged_files_name_file_and_reason(photo, tmp_path, monkeypatch):
    whole = encoded(photo, "JPEG").getvalue()
    cases = {
        "empty.jpg": (b"", "not an image"),
        "text.jpg": (b"<html>not found</html>", "not an image"),
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "cut.png": (encoded(photo, "PNG").getvalue()[:2000], "truncated|broken|cut"),
        "header.png": (
            encoded(photo, "PNG").getvalue()[:20],
            "not an image|truncated|broken|Truncated",
        ),
    }
    for name, (content, why) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DecodeError, match=why) as caught:
            read_rgb(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DecodeError, match="no such file"):
        read_rgb(tmp_path / "absent.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match="more pixels than the safe limit of 2,000"):
        read_rgb(encoded(photo, "PNG"), "bomb.png")


def test_deep_greyscale_is_scaled_by_its_range():
    """Values without a known range are refused: PIL's `convert` would clip them."""

    def grey(values, kind="TIFF"):
        return encoded(Image.fromarray(values), kind)

    floats = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    assert np.asarray(read_rgb(grey(floats)))[..., 0].tolist() == (
        np.rint(floats * 255).astype(int).tolist()
    )
    whole = np.full((4, 4), 65535, np.uint16)
    assert read_rgb(grey(whole, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    for values, message in (
        (floats * 255, r"float values from 0 to 255 are not in \[0, 1\]"),
        (floats * np.nan, "not in"),
        (np.full((4, 4), -7, np.int32), "negative values, down to -7"),
    ):
        with pytest.raises(DecodeError, match=message):
            read_rgb(grey(values), "x.tif")


def test_sixteen_bit_colour_takes_the_high_byte():
    """PIL takes the high byte of 16-bit RGB, and the rule for greyscale follows it."""
    # Each row is a filter byte, then big-endian pixels.
    rows = (b"\0" + bytes([200, 255, 100, 0, 7, 128]) * 4) * 4

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert read_rgb(io.BytesIO(file)).getpixel((2, 2)) == (200, 100, 7)
