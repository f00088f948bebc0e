"""Latents [n, d] and codebooks [k, d] that are hard to search exactly, each for another reason."""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.kernels.nearest_code import grid_search


def normal(n: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def clustered(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Return codes so close to a few centres that fp32 cannot distinguish many of them."""
    z, e = normal(n, k, d)
    return z, e[torch.arange(k) % 8] + 1e-6 * e


def off_centre(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z, e = normal(n, k, d)
    return 3 + 0.3 * z, 3 + 0.3 * e


def duplicated(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z, e = normal(n, k, d)
    return z, e[torch.arange(k) % (k // 2 + 1)]


def dead(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Return codes of which nine tenths are the same point."""
    z, e = normal(n, k, d)
    return z, torch.where((torch.arange(k) % 10 == 3)[:, None], e, e[:1])


def exact_hits(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    _z, e = normal(n, k, d)
    return e[torch.arange(n) % k].clone(), e


def integers(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Return small integers, with many exact ties between different codes."""
    z, e = normal(n, k, d)
    return z.round(), (2 * e).round()


def far_away(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Return steps of one fp32 rounding around 3000.

    |z|^2 + |e|^2 - 2 z.e cannot distinguish these codes, not even in fp64.
    """
    z, e = normal(n, k, d)
    return 3000 + 2.0**-12 * (2 * z).round(), 3000 + 2.0**-12 * (2 * e).round()


def huge(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z, e = normal(n, k, d)
    return 1e30 * z, 1e30 * e  # the squares overflow fp32


def tiny(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z, e = normal(n, k, d)
    return 1e-30 * z, 1e-30 * e  # the squares vanish in fp32


def mixed_scales(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z, e = normal(n, k, d)
    return z * 10.0 ** torch.linspace(-30, 30, n)[:, None], e * 10.0 ** torch.linspace(-30, 30, k)[
        :, None
    ]


def sphere(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Return codes with equal distance to the origin."""
    z, e = normal(n, k, d)
    return torch.where((torch.arange(n) % 2 == 0)[:, None], z, 1e-3 * z), e / e.norm(
        dim=1, keepdim=True
    )


def outside(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Return latents from just outside the codebook to the end of fp32's range."""
    z, e = normal(n, k, d)
    return z / z.abs().amax(1, keepdim=True) * 10.0 ** torch.linspace(0, 38, n)[:, None], e


def midway(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Return latents on the bisectors of pairs of codes, up to rounding."""
    _z, e = normal(n, k, d)
    return (e[torch.arange(n) % k] + e[(3 * torch.arange(n) + 1) % k]) / 2, e


DATA = [
    normal,
    clustered,
    off_centre,
    duplicated,
    dead,
    exact_hits,
    integers,
    far_away,
    huge,
    tiny,
    mixed_scales,
    sphere,
    outside,
    midway,
]


def grid_codes(z: Tensor, grid: Tensor, instruction_set: int = 0) -> Tensor:
    codes = torch.empty(len(z), dtype=torch.int64)
    grid_search.search(z, grid, codes, torch.zeros((), dtype=torch.int64), instruction_set)
    return codes
