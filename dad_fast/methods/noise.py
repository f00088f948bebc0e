"""Random numbers keyed by sample, not by position in a batch.

Every draw is a pure function of (key, counter): the same sample of the same epoch gets the same
noise whatever the batch size, the number of processes or the device. One 64-bit hash (splitmix64's
finalizer over key and counter) gives two 24-bit uniforms. Integer operations only up to the last
step, so CPU and GPU agree on the uniforms exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits (torch has no unsigned multiplication)."""
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right logically (torch's `>>` on int64 copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def keyed_bits(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Hash [B, count] int64 of each key in `keys` [B] int64; different `stream`s of one key are
    independent.
    """
    offset = (stream * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) & ((1 << 64) - 1)
    base = _mix(keys + _signed(offset))  # [B]
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * GOLDEN  # [count]
    return _mix(base[:, None] + counter[None, :])


def _uniform_pair(keys: Tensor, count: int, stream: int) -> tuple[Tensor, Tensor]:
    bits = keyed_bits(keys, count, stream)
    scale = 2.0**-24
    return _shift(bits, 40).float() * scale, (bits & 0xFFFFFF).float() * scale


def keyed_uniform(keys: Tensor, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Draw uniform [0, 1) float32 [B, *shape], multiples of 2^-24."""
    size = math.prod(shape)
    pair = _uniform_pair(keys, (size + 1) // 2, stream)
    return torch.cat(pair, dim=1)[:, :size].reshape(len(keys), *shape)


def keyed_normal(keys: Tensor, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Draw standard normal float32 [B, *shape] by Box-Muller (values up to 5.8 in magnitude)."""
    size = math.prod(shape)
    u, v = _uniform_pair(keys, (size + 1) // 2, stream)
    # u + 2^-25 lies in (0, 1): never log 0.
    radius = (-2.0 * (u + 2.0**-25).log()).sqrt()
    angle = v * (2.0 * math.pi)
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)
    return normal[:, :size].reshape(len(keys), *shape)
