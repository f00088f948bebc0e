"""Corruptions against the published definitions, written here in numpy, scipy and PIL."""

from __future__ import annotations

import io
import math
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dad_fast.evaluation import tables as table
from dad_fast.evaluation.corruptions import common as corruptions
from dad_fast.evaluation.corruptions.common import CORRUPTIONS
from dad_fast.evaluation.corruptions.names import STANDARD, num_severities
from dad_fast.methods.noise import keyed_uniform


def images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Make noisy blocks of colour in uint8 levels: edges for blurs, flat parts for noise."""
    generator = torch.Generator().manual_seed(seed)
    blocks = (
        torch.rand(count, 3, side // 7, side // 7, generator=generator)
        .repeat_interleave(7, 2)
        .repeat_interleave(7, 3)
    )
    pixels = (0.9 * blocks + 0.1 * torch.rand(blocks.shape, generator=generator)) * 255
    return torch.nn.functional.interpolate(pixels, size=side).round() / 255


def to_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1) / 255.0


KEYS = torch.tensor([3, 1_000_000_007, -5, 42])


@pytest.mark.parametrize("side", [28, 70])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_in_range_deterministic_and_independent_of_the_batch(name, side):
    x = images(4, side)
    before = x.clone()
    severity = min(3, num_severities(name))
    together = CORRUPTIONS[name](x, severity, KEYS)
    assert together.shape == x.shape and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1 and not together.equal(x)
    assert x.equal(before)
    order = torch.tensor([2, 0])
    alone = CORRUPTIONS[name](x[order], severity, KEYS[order])
    torch.testing.assert_close(
        alone, together[order], rtol=0, atol=1e-6
    )  # eight ulps: matrix products round by their shape


DRAWN = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
)


@pytest.mark.parametrize("name", DRAWN)
def test_random_numbers_depend_on_key_and_severity(name):
    x = images(1, 28).expand(4, -1, -1, -1).contiguous()
    same = CORRUPTIONS[name](x, 2, torch.tensor([7, 7, 8, 7]))
    assert same[0].equal(same[1]) and same[0].equal(same[3]) and not same[0].equal(same[2])
    change = [
        (CORRUPTIONS[name](x[:1], severity, KEYS[:1]) - x[:1]).flatten() for severity in (2, 3)
    ]
    if name.endswith("noise"):
        assert abs(np.corrcoef(change[0], change[1])[0, 1]) < 0.2


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if num_severities(name) == 5])
def test_severity_grows(name):
    for side in (28, 70):
        x = images(4, side)
        change = [
            (CORRUPTIONS[name](x, severity, KEYS) - x).abs().mean().item()
            for severity in range(1, 6)
        ]
        if (
            name == "defocus_blur"
        ):  # as published, severity 4 at 32 px (a sharp cross) changes less than severity 3
            change.pop(3)
        if name == "pixelate":  # a smaller grid may fall on the block edges
            change = [change[0], change[-1]]
        if name in (
            "glass_blur",
            "snow",
            "frost",
            "elastic_transform",
        ):  # published constants that trade one thing for another
            change = [min(change)]
        assert change == sorted(change) and change[0] > 0


def test_noises_have_the_published_moments():
    x = torch.full((8, 3, 128, 128), 127 / 255)
    keys = torch.arange(8)
    for severity, sigma in enumerate((0.08, 0.12, 0.18), start=1):  # beyond that, clipping bites
        noise = CORRUPTIONS["gaussian_noise"](x, severity, keys) - x
        assert (
            noise.std().item() == pytest.approx(sigma, rel=0.02)
            and abs(noise.mean().item()) < 0.002
        )
    for severity, photons in enumerate((60, 25, 12, 5, 3), start=1):
        counts = CORRUPTIONS["shot_noise"](x * 0.5, severity, keys) * photons
        rate = (
            0.25 * photons * 254 / 255 * 64 / 63.5
        )  # the image is read in uint8 levels: 63.5 becomes 64
        kept = counts[counts < photons - 0.5]
        assert torch.allclose(kept, kept.round(), atol=1e-4)
        for k in range(4):
            expected = math.exp(-rate) * rate**k / math.factorial(k)
            if k < photons - 1:
                assert (counts.round() == k).float().mean().item() == pytest.approx(
                    expected, abs=0.004
                )
    for severity, amount in enumerate((0.03, 0.06, 0.09, 0.17, 0.27), start=1):
        noisy = CORRUPTIONS["impulse_noise"](x, severity, keys)
        assert (noisy == 0).float().mean().item() == pytest.approx(amount / 2, rel=0.05)
        assert (noisy == 1).float().mean().item() == pytest.approx(amount / 2, rel=0.05)


def test_shot_noise_keeps_black_and_small_images_take_small_constants():
    x = torch.zeros(2, 3, 28, 28)
    x[:, :, 14:] = 1
    noisy = CORRUPTIONS["shot_noise"](x, 5, KEYS[:2])
    assert noisy[:, :, :14].abs().max() == 0
    below = noisy[
        :, :, 14:
    ]  # Poisson(50) / 50, cut at 1: E min(X, 50) / 50 = 1 - e^-50 50^50 / 50!
    assert below.mean().item() == pytest.approx(
        1 - math.exp(-50 + 50 * math.log(50) - math.lgamma(51)), abs=0.005
    )


@pytest.mark.parametrize(("side", "severities"), [(28, range(1, 6)), (70, range(1, 6))])
def test_defocus_blur_equals_scipy(side, severities):
    ndimage = pytest.importorskip("scipy.ndimage")
    published = (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    )
    x = images(1, side)
    for severity in severities:
        radius, alias = published[side > 64][severity - 1]
        half, taps = (8, 3) if radius <= 8 else (radius, 5)
        rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
        kernel = (rows**2 + columns**2 <= radius**2).astype(float)
        kernel /= kernel.sum()
        gauss = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * alias**2))
        kernel = ndimage.correlate(kernel, np.outer(gauss, gauss) / gauss.sum() ** 2, mode="mirror")
        expected = np.stack(
            [ndimage.correlate(channel, kernel, mode="mirror") for channel in x[0].double().numpy()]
        )
        found = CORRUPTIONS["defocus_blur"](x, severity, KEYS[:1])[0].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def stream_of(name: str, severity: int) -> int:
    return zlib.crc32(name.encode()) << 16 | severity << 8


def test_names_and_order_match_the_published_folders():
    published = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog brightness contrast
        elastic_transform pixelate jpeg_compression"""
    assert list(STANDARD) == published.split() and list(CORRUPTIONS) == [*STANDARD, "invert"]
    assert all(num_severities(name) == 5 for name in STANDARD)


def test_table_notes_that_frost_differs_from_the_published():
    suites = {
        name: {"num_images": 10, "top1": 50.0, "top5": None, "ece": 1.0, "nll": 1.0}
        for name in ("test", "frost:3", "fog")
    }
    record = {
        "runs": [
            {
                "variant": "ce",
                "method": "ce",
                "seed": 0,
                "epochs": 1.0,
                "seconds": 1.0,
                "suites": suites,
                "teacher": None,
            }
        ]
    }
    assert any(
        note.startswith("frost: the ice is drawn by a program")
        for note in table.notes(record, "top1")
    )
    del suites["frost:3"]
    assert not any("frost" in note for note in table.notes(record, "top1"))


@pytest.mark.parametrize("side", [28, 70])
def test_zoom_blur_equals_scipy(side):
    ndimage = pytest.importorskip("scipy.ndimage")
    ends = (
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    )
    x = images(1, side)
    for severity in range(1, 6):
        end, step = ends[side > 64][severity - 1]
        factors = np.arange(1, end, step)
        expected = x[0].double().numpy().copy()
        for factor in factors:
            crop = math.ceil(side / factor)
            top = (side - crop) // 2
            large = ndimage.zoom(
                x[0, :, top : top + crop, top : top + crop].double().numpy(),
                (1, factor, factor),
                order=1,
            )
            trim = (large.shape[1] - side) // 2
            expected += large[:, trim : trim + side, trim : trim + side]
        found = CORRUPTIONS["zoom_blur"](x, severity, KEYS[:1])[0].numpy()
        np.testing.assert_allclose(found, expected / (len(factors) + 1), atol=1e-5)


def test_fog_equals_the_published_loop():
    def published(side: int, decay: float, draws: list[np.ndarray]) -> np.ndarray:
        field = np.zeros((side, side))
        step, wibble = side, 100.0
        while step >= 2:
            half, at = step // 2, range(0, side, step)
            uniform = draws.pop(0)
            for i, r in enumerate(at):
                for j, c in enumerate(at):
                    corners = sum(
                        field[(r + a) % side, (c + b) % side] for a in (0, step) for b in (0, step)
                    )
                    field[r + half, c + half] = corners / 4 + wibble * uniform[i, j] * wibble
            for rows, columns in ((0, half), (half, 0)):
                uniform = draws.pop(0)
                for i, r in enumerate(at):
                    for j, c in enumerate(at):
                        y, z = r + rows, c + columns
                        around = ((-half, 0), (half, 0), (0, -half), (0, half))
                        mean = sum(field[(y + a) % side, (z + b) % side] for a, b in around) / 4
                        field[y, z] = mean + wibble * uniform[i, j] * wibble
            step, wibble = half, wibble / decay
        field -= field.min()
        return field / field.max()

    x = images(2, 28)
    found = CORRUPTIONS["fog"](x, 4, KEYS[:2])
    stream = zlib.crc32(b"fog") << 16 | 4 << 8
    for i in range(2):
        shapes = [(1 << n, 1 << n) for n in range(5) for _ in range(3)]
        draws = [
            2 * keyed_uniform(KEYS[i : i + 1], shape, stream + n + 1)[0].double().numpy() - 1
            for n, shape in enumerate(shapes)
        ]
        haze = published(32, 2, draws)[:28, :28]
        brightest = x[i].max().item()
        np.testing.assert_allclose(
            found[i], (x[i].numpy() + haze) * brightest / (brightest + 1), atol=1e-5
        )


def test_brightness_equals_hsv():
    colors = pytest.importorskip("skimage.color")
    x = images(1, 70)
    x[:, :, :7, :7] = 0
    for severity, shift in enumerate((0.1, 0.2, 0.3, 0.4, 0.5), start=1):
        hsv = colors.rgb2hsv(x[0].permute(1, 2, 0).double().numpy())
        hsv[..., 2] = np.clip(hsv[..., 2] + shift, 0, 1)
        found = CORRUPTIONS["brightness"](x, severity, KEYS[:1])[0].permute(1, 2, 0)
        np.testing.assert_allclose(found, colors.hsv2rgb(hsv), atol=1e-6)


def test_contrast_and_invert():
    x = images(2, 28)
    mean = x.double().mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(
        CORRUPTIONS["contrast"](x, 5, KEYS[:2]).double(),
        ((x - mean) * 0.15 + mean).clamp(0, 1),
        atol=1e-6,
    )
    assert CORRUPTIONS["invert"](x, 1, KEYS[:2]).equal(1 - x) and num_severities("invert") == 1


@pytest.mark.parametrize(
    ("side", "shares"), [(28, (0.95, 0.9, 0.85, 0.75, 0.65)), (70, (0.6, 0.5, 0.4, 0.3, 0.25))]
)
def test_pixelate_equals_pil(side, shares):
    x = images(1, side)
    for severity, share in enumerate(shares, start=1):
        small = to_pil(x[0]).resize((int(side * share),) * 2, Image.Resampling.BOX)
        expected = from_pil(small.resize((side, side), Image.Resampling.BOX))
        found = CORRUPTIONS["pixelate"](x, severity, KEYS[:1])[0].numpy()
        np.testing.assert_allclose(found, expected, atol=1.01 / 255)


def test_jpeg_equals_pil():
    for side, quality in ((28, 40), (70, 7)):
        x = images(2, side)
        found = CORRUPTIONS["jpeg_compression"](x, 5, KEYS[:2])
        for i in range(2):
            file = io.BytesIO()
            to_pil(x[i]).save(file, "JPEG", quality=quality)
            np.testing.assert_allclose(found[i], from_pil(Image.open(file)), atol=1e-6)


def test_not_square():
    x = torch.rand(2, 3, 40, 28)
    for name in CORRUPTIONS:
        assert CORRUPTIONS[name](x, 1, KEYS[:2]).shape == x.shape


def test_every_corruption_has_one_or_five_severities_at_both_sizes():
    for _, small, large in corruptions._TABLE.values():
        assert len(small) == len(large) in (1, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [28, 70])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_cuda_equals_cpu(name, side):
    x = images(4, side)
    for severity in range(1, num_severities(name) + 1):
        found = CORRUPTIONS[name](x.cuda(), severity, KEYS.cuda()).cpu()
        off = (
            found - CORRUPTIONS[name](x, severity, KEYS)
        ).abs() > 2e-3  # half a pixel level; convolutions may round as tf32
        assert off.float().mean() <= (
            1e-4 if name == "shot_noise" else 0
        )  # a draw on the edge between two counts may fall either way
