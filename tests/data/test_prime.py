"""PRIME: keyed parameters, and operations by the paper's formulas."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from PIL import Image

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.apply_prime import average_prime, displacement, mode_stds
from dad_fast.data.augment.execute import execute
from dad_fast.data.augment.policies import parse_policy
from dad_fast.data.augment.prime import Curve, Deform, Filter, Prime, PrimeChains
from dad_fast.data.augment.records import sample_record
from dad_fast.keyed_random import Draws

SIDE = 24
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
X = NOISE / 255.0


def applied(*chain):
    """Apply one chain alone; levels in [0, 1], rounded to 8 bits."""
    return (
        np.asarray(average_prime(Image.fromarray(NOISE), PrimeChains((chain,), (1.0,), 1.0))) / 255
    )


def test_chains_weights_and_strengths_follow_the_paper():
    assert parse_policy("prime").policy == Prime(3, 0)
    policy = parse_policy("prime-w4").policy
    found = [policy.draw(Draws(0, 1, 0, i), "", 224) for i in range(400)]
    lengths = np.bincount([len(chain) for blend in found for chain in blend.chains])
    assert len(lengths) == 4 and lengths[1:] == pytest.approx(1600 / 3, rel=0.15)
    assert np.mean([blend.share for blend in found]) == pytest.approx(0.5, abs=0.06)
    weights = np.array([blend.weights for blend in found])
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    ops = [op for blend in found for chain in blend.chains for op in chain]
    for kind in (Filter, Curve, Deform):
        assert sum(type(op) is kind for op in ops) == pytest.approx(len(ops) / 3, rel=0.1)
    # A filter's variance is that of U(0, 4) squared: 16/3.
    filters = np.array([op.weights for op in ops if type(op) is Filter])
    assert filters[:, 4].mean() == pytest.approx(1.0, abs=0.25)
    assert np.delete(filters, 4, axis=1).var() == pytest.approx(16 / 3, rel=0.1)
    curves = [op for op in ops if type(op) is Curve]
    assert all(
        1 <= len(row) <= 20 and op.first + len(row) <= 501 for op in curves for row in op.weights
    )
    values = np.concatenate([np.ravel(op.weights) for op in curves])
    assert values.var() == pytest.approx(0.025, rel=0.1)
    assert [
        len(chain) for chain in parse_policy("prime-d2").policy.draw(Draws(0, 1, 0, 0), "", 9)[0]
    ] == [*(2, 2, 2)]


def test_deformations_move_by_half_a_pixel_to_the_fold():
    side = 224
    found = [Prime(1, 1).draw(Draws(0, 1, 0, i), "", side).chains[0][0] for i in range(2000)]
    deforms = [op for op in found if type(op) is Deform]
    assert {2, 3} < {op.cut for op in deforms} and max(op.cut for op in deforms) <= 500
    for op in deforms:
        moved = side * math.sqrt(math.pi * op.temperature * math.log(op.cut)) / 2
        largest = max(0.5, side / (math.pi * op.cut))
        assert 0.499 < moved < largest * 1.001
    assert len({op.seed for op in deforms}) == len(deforms)


def test_a_filter_correlates_with_black_edges():
    weights = (0.1, -0.2, 0.3, 0.0, 0.9, -0.1, 0.2, 0.05, -0.3)
    padded = np.pad(X, ((1, 1), (1, 1), (0, 0)))
    expected = sum(
        weights[3 * i + j] * padded[i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)
    )
    assert np.abs(applied(Filter(weights)) - expected.clip(0, 1)).max() < 0.51 / 255


@pytest.mark.parametrize("first", [1, 40, 480])
def test_a_curve_is_a_sum_of_sines(first):
    weights = np.random.default_rng(first).normal(0, 0.2, (3, 20))
    k = np.arange(first, first + 20)
    expected = X + np.einsum("ck,hwck->hwc", weights, np.sin(np.pi * X[..., None] * k))
    found = applied(Curve(first, tuple(map(tuple, weights))))
    assert np.abs(found - expected.clip(0, 1)).max() < 0.52 / 255


def test_a_curve_between_levels_is_interpolated():
    """After a filter, values are no levels of 8 bits any more."""
    half = Filter((0, 0, 0, 0, 0.37, 0, 0, 0, 0))
    weights = ((0.2,), (-0.1,), (0.15,))
    values = np.float32(X) * np.float32(0.37)
    expected = values + np.array(weights)[:, 0] * np.sin(np.pi * 500 * values)
    found = applied(half, Curve(500, weights))
    assert np.abs(found - expected.clip(0, 1)).max() < 1.6 / 255


def test_a_deformation_is_bilinear_and_repeats_the_edge():
    op = Deform(6, 0.0004, 9)
    dx, dy = math.sqrt(op.temperature) * SIDE * displacement(op.cut, op.seed, SIDE)
    assert 0.2 < np.abs(dx).mean() < 3
    x = (np.arange(SIDE) - dx).clip(0, SIDE - 1)
    y = (np.arange(SIDE)[:, None] - dy).clip(0, SIDE - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, SIDE - 1), np.minimum(top + 1, SIDE - 1)
    u, v = (x - left)[..., None], (y - top)[..., None]
    upper = X[top, left] * (1 - u) + X[top, right] * u
    lower = X[bottom, left] * (1 - u) + X[bottom, right] * u
    assert np.abs(applied(op) - (upper * (1 - v) + lower * v)).max() < 0.52 / 255


@pytest.mark.parametrize(("cut", "side"), [(3, 24), (22, 24), (30, 24), (60, 24), (9, 4)])
def test_folded_modes_have_the_variance_of_all_modes(cut, side):
    """Of the displacement at every pixel, and at its neighbour's: all of a Gaussian field."""
    k = np.arange(1, cut + 1)
    squared = k[:, None] ** 2 + k**2
    variances = np.where(squared < (cut + 0.5) ** 2, 1 / squared, 0)
    points = np.linspace(0, 1, side)

    def products(count):
        """Products of the sines of each mode at neighbours."""
        sines = np.sin(math.pi * points[:, None] * np.arange(1, count + 1))
        return sines[:-1] * sines[1:]

    expected = products(cut) @ variances @ products(cut).T
    stds = mode_stds(cut, side).astype(np.float64)
    assert stds.shape == (min(cut, side - 2),) * 2
    found = products(len(stds)) @ stds**2 @ products(len(stds)).T
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_chains_are_averaged_and_blended():
    twice = Filter((0, 0, 0, 0, 2, 0, 0, 0, 0))
    nothing = Filter((0,) * 9)
    blend = PrimeChains(((twice,), (nothing,), ()), (0.5, 0.3, 0.2), 0.6)
    found = np.asarray(average_prime(Image.fromarray(NOISE), blend)) / 255
    expected = 0.4 * X + 0.6 * (0.5 * (2 * X).clip(0, 1) + 0.2 * X)
    assert np.abs(found - expected).max() < 0.51 / 255


@pytest.mark.parametrize("img_size", [1, 2, 3, 16])
def test_a_record_replays_at_every_size(img_size):
    aug = AugmentConfig(aa="prime")
    for sample in range(4):
        record = sample_record(aug, img_size, 5, 1, sample, SIDE, SIDE)
        assert record == sample_record(aug, img_size, 5, 1, sample, SIDE, SIDE)
        assert json.dumps(dataclasses.asdict(record))
        pixels = execute(record, Image.fromarray(NOISE))
        assert pixels.shape == (img_size, img_size, 3) and pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, execute(record, Image.fromarray(NOISE)))
