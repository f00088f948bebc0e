"""PRIME (arXiv 2112.13547) as data: random filters, deformations and colour curves in chains.

Strengths are those of the authors' code for ImageNet, without the consistency loss over three
views, which they leave out there too. Their filter is off centre by one pixel; ours is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dad_fast.keyed_random import Draws

# Standard deviation of the 3x3 filter's weights, at most
FILTER_STD = 4.0
# Highest frequency of a colour curve in half periods, frequencies at once, variance of each at most
CURVE_CUT, CURVE_BANDWIDTH, CURVE_VARIANCE = 500, 20, 0.05
# Lowest and highest cut-off of a deformation, in half periods of the image
DEFORM_CUTS = 2, 500


class Filter(NamedTuple):
    """A 3x3 correlation, the same for each channel; `weights` by rows."""

    weights: tuple[float, ...]


class Curve(NamedTuple):
    """v + Σ c_k sin(π k v) for k = first, first + 1, ...; `weights` has the c_k of each channel."""

    first: int
    weights: tuple[tuple[float, ...], ...]


class Deform(NamedTuple):
    """A smooth displacement of random modes (i, j) with i² + j² up to about cut².

    temperature: variance of the modes' sum. seed: of their coefficients.
    """

    cut: int
    temperature: float
    seed: int


PrimeOp = Filter | Curve | Deform


class PrimeChains(NamedTuple):
    """Chains on one image, averaged with `weights` and blended with it; share: of the average."""

    chains: tuple[tuple[PrimeOp, ...], ...]
    weights: tuple[float, ...]
    share: float


@dataclass(frozen=True)
class Prime:
    """`width` chains of `depth` operations (1 to 3 where `depth` is 0)."""

    width: int = 3
    depth: int = 0

    @classmethod
    def parse(cls, sections: Sequence[str]) -> Prime:
        """Parse the checked sections of `prime-w3-d2`."""
        found = {section[0]: int(section[1:]) for section in sections}
        return cls(width=found.get("w", cls.width), depth=found.get("d", cls.depth))

    def draw(self, draws: Draws, interpolation: str, img_size: int) -> PrimeChains:
        weights = draws.dirichlet(1.0, self.width)
        share = draws.uniform()
        chains = []
        for _ in range(self.width):
            depth = self.depth or 1 + draws.below(3)
            kinds = [draws.below(3) for _ in range(depth)]
            chains.append(tuple(_DRAW[kind](draws, img_size) for kind in kinds))
        return PrimeChains(tuple(chains), weights, share)


def _filter(draws: Draws, img_size: int) -> Filter:
    std = draws.between(0, FILTER_STD)
    weights = [std * draws.normal() for _ in range(9)]
    weights[4] += 1.0
    return Filter(tuple(weights))


def _curve(draws: Draws, img_size: int) -> Curve:
    cut = 1 + draws.below(CURVE_CUT)
    first = 1 + draws.below(cut)
    count = min(CURVE_BANDWIDTH, cut + 1 - first)
    std = math.sqrt(draws.between(0, CURVE_VARIANCE))
    weights = [tuple(std * draws.normal() for _ in range(count)) for _ in range(3)]
    return Curve(first, tuple(weights))


def _deform(draws: Draws, img_size: int) -> Deform:
    """Draw from half a pixel's displacement to the largest that does not fold the image."""
    lowest, highest = DEFORM_CUTS
    most = lowest + 1 + draws.below(highest - lowest)
    cut = int(lowest + draws.beta(0.5) * (most + 1 - lowest))
    # Beta can round to 1.
    cut = min(cut, most)
    log = math.log(cut)
    least = 1.0 / (math.pi * img_size**2 * log)
    largest = max(least, 4.0 / (math.pi**3 * cut**2 * log))
    temperature = least + draws.beta(0.5) * (largest - least)
    return Deform(cut, temperature, draws.below(1 << 53))


_DRAW = (_deform, _curve, _filter)
