"""Keyed noise depends on the key alone and has the right distribution."""

import pytest

torch = pytest.importorskip("torch")
from dad_fast.methods.noise import keyed_bits, keyed_normal, keyed_uniform


def splitmix_mix(x: int) -> int:
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_bits_equal_unsigned_arithmetic():
    mask = (1 << 64) - 1
    for key in (0, 1, -1, 123456789012345678, -(1 << 63)):
        for stream in (0, 3):
            base = splitmix_mix((key + stream * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) & mask)
            expected = [splitmix_mix((base + i * 0x9E3779B97F4A7C15) & mask) for i in (1, 2, 3)]
            got = [b & mask for b in keyed_bits(torch.tensor([key]), 3, stream)[0].tolist()]
            assert got == expected


def test_a_sample_does_not_depend_on_its_batch():
    keys = torch.arange(10) * 7919
    together = keyed_normal(keys, (3, 5, 5))
    for i in (0, 4, 9):
        assert torch.equal(together[i], keyed_normal(keys[i : i + 1], (3, 5, 5))[0])


def test_streams_and_keys_are_independent():
    keys = torch.arange(2000)
    draws = [keyed_normal(keys, (1,), stream).flatten() for stream in (0, 1)] + [
        keyed_normal(keys + 1, (1,)).flatten()
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(3)
    assert correlation.abs().max() < 5 / 2000**0.5


def test_moments_and_range():
    keys = torch.arange(64)
    u, z = keyed_uniform(keys, (4001,)), keyed_normal(keys, (4001,))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.001
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.015 and abs((z**4).mean() - 3) < 0.12
    assert torch.isfinite(z).all() and u.shape == (64, 4001)
