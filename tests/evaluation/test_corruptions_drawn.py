"""Glass and motion blur, snow, frost and elastic transform against the published definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dad_fast.evaluation.corruptions.common import CORRUPTIONS
from dad_fast.evaluation.corruptions.weather import ICE_COLOR, ICE_CONTRAST, ice
from dad_fast.methods.noise import keyed_normal, keyed_uniform
from tests.evaluation.test_corruptions import KEYS, images, stream_of


@pytest.mark.parametrize("side", [28, 70])
def test_glass_blur_equals_the_published_loop(side):
    ndimage = pytest.importorskip("scipy.ndimage")
    published = (
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    )
    x = images(2, side)
    for severity in range(1, 6):
        sigma, reach, passes = published[side > 64][severity - 1]
        found = CORRUPTIONS["glass_blur"](x, severity, KEYS[:2])
        for i in range(2):
            blurred = [
                ndimage.gaussian_filter(channel, sigma, mode="nearest", truncate=4)
                for channel in x[i].double().numpy()
            ]
            levels = np.uint8(np.stack(blurred, axis=-1) * 255 + 1e-6)
            for n in range(passes):
                uniform = keyed_uniform(
                    KEYS[i : i + 1], (2, side, side), stream_of("glass_blur", severity) + n
                )[0].numpy()
                moves = np.floor(uniform * 2 * reach).astype(int) - reach
                for h in range(side - reach, reach, -1):
                    for w in range(side - reach, reach, -1):
                        to_h, to_w = h + moves[1, h, w], w + moves[0, h, w]
                        levels[h, w], levels[to_h, to_w] = levels[to_h, to_w], levels[h, w]
            again = [
                ndimage.gaussian_filter(levels[..., c] / 255.0, sigma, mode="nearest", truncate=4)
                for c in range(3)
            ]
            np.testing.assert_allclose(found[i], np.stack(again), atol=1e-6)


def motion_by_hand(image: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Apply ImageMagick's definition to one image [C, H, W], tap by tap."""
    _, height, width = image.shape
    taps = 2 * radius + 1
    weights = [math.exp(-i * i / (2 * sigma * sigma)) for i in range(taps)]
    total = np.zeros_like(image)
    for i in range(taps):
        y = math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
        x = math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
        rows, columns = (
            np.clip(np.arange(height) + y, 0, height - 1),
            np.clip(np.arange(width) + x, 0, width - 1),
        )
        total += weights[i] / sum(weights) * image[:, rows[:, None], columns]
    return total


def angle(key: torch.Tensor, low: float, high: float, stream: int) -> float:
    return low + (high - low) * keyed_uniform(key[None], (1,), stream).item()


@pytest.mark.parametrize("side", [28, 70])
def test_motion_blur_equals_the_definition(side):
    published = (
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    )
    x = images(4, side)
    for severity in range(1, 6):
        found = CORRUPTIONS["motion_blur"](x, severity, KEYS)
        for i in range(4):
            degrees = angle(KEYS[i], -45, 45, stream_of("motion_blur", severity))
            expected = motion_by_hand(
                x[i].double().numpy(), *published[side > 64][severity - 1], degrees
            )
            np.testing.assert_allclose(found[i], expected, atol=1e-5)


@pytest.mark.parametrize("side", [28, 70])
def test_snow_equals_the_definition(side):
    ndimage = pytest.importorskip("scipy.ndimage")
    small = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )
    large = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )
    x = images(2, side)
    for severity in range(1, 6):
        mean, spread, zoom, threshold, radius, sigma, kept = (large if side > 64 else small)[
            severity - 1
        ]
        found = CORRUPTIONS["snow"](x, severity, KEYS[:2])
        for i in range(2):
            stream = stream_of("snow", severity)
            layer = (
                mean
                + spread
                * keyed_normal(KEYS[i : i + 1], (1, side, side), stream)[0, 0].double().numpy()
            )
            crop = math.ceil(side / zoom)
            top = (side - crop) // 2
            layer = ndimage.zoom(layer[top : top + crop, top : top + crop], (zoom, zoom), order=1)
            trim = (len(layer) - side) // 2
            layer = layer[trim : trim + side, trim : trim + side]
            layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
            layer = motion_by_hand(
                layer[None], radius, sigma, angle(KEYS[i], -135, -45, stream + 1)
            )[0]
            image = x[i].double().numpy()
            grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
            image = kept * image + (1 - kept) * np.maximum(image, grey * 1.5 + 0.5)
            expected = np.clip(image + layer + np.rot90(layer, k=2), 0, 1)
            off = (
                np.abs(found[i].numpy() - expected) > 1e-4
            )  # a flake at the threshold may fall either way
            assert off.mean() < 0.01


def test_frost_has_colour_and_contrast_of_the_photographs():
    x = images(2, 70)
    for severity, (kept, strength) in enumerate(
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), start=1
    ):
        texture = ice(KEYS[:2], 70, 70, stream_of("frost", severity))
        assert CORRUPTIONS["frost"](x, severity, KEYS[:2]).equal(
            (kept * x + strength * texture).clamp(0, 1)
        )
        assert torch.allclose(
            texture.mean(dim=(2, 3)), torch.tensor(ICE_COLOR).expand(2, 3), atol=1e-5
        )
        assert torch.allclose(texture.std(dim=(2, 3)), torch.tensor(ICE_CONTRAST), rtol=1e-3)
        assert abs(np.corrcoef(texture[0, 0].flatten(), texture[1, 0].flatten())[0, 1]) < 0.3


@pytest.mark.parametrize("side", [28, 70])
def test_elastic_transform_equals_scipy(side):
    ndimage = pytest.importorskip("scipy.ndimage")
    small = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )
    large = (
        (2, 0.7, 0.1),
        (2, 0.08, 0.2),
        (0.05, 0.01, 0.02),
        (0.07, 0.01, 0.02),
        (0.12, 0.01, 0.02),
    )
    x = images(2, side)
    for severity in range(1, 6):
        alpha, sigma, reach = (
            share * (244 if side > 64 else 32)
            for share in (large if side > 64 else small)[severity - 1]
        )
        found = CORRUPTIONS["elastic_transform"](x, severity, KEYS[:2])
        stream = stream_of("elastic_transform", severity)
        for i in range(2):
            middle, third = side // 2, side // 3
            before = middle + np.array(
                [[third, third], [third, -third], [-third, -third]], dtype=float
            )
            after = before + reach * (
                2 * keyed_uniform(KEYS[i : i + 1], (3, 2), stream)[0].double().numpy() - 1
            )
            forward = np.linalg.solve(
                np.c_[before, np.ones(3)], after
            ).T  # [2, 3]: where each point of the image goes
            inverse = np.linalg.inv(np.r_[forward, [[0, 0, 1]]])
            rows, columns = np.mgrid[:side, :side].astype(float)
            from_x, from_y = (
                inverse[n, 0] * columns + inverse[n, 1] * rows + inverse[n, 2] for n in (0, 1)
            )
            image = x[i].double().numpy()
            warped = [
                ndimage.map_coordinates(channel, (from_y, from_x), order=1, mode="mirror")
                for channel in image
            ]
            noise = (
                2 * keyed_uniform(KEYS[i : i + 1], (2, side, side), stream + 1)[0].double().numpy()
                - 1
            )
            dx, dy = (
                alpha * ndimage.gaussian_filter(one, sigma, mode="reflect", truncate=3)
                for one in noise
            )
            expected = [
                ndimage.map_coordinates(channel, (rows + dy, columns + dx), order=1, mode="reflect")
                for channel in warped
            ]
            np.testing.assert_allclose(found[i], np.stack(expected), atol=1e-5)
