"""Augmentation policies as data: a policy draws the operations of a record from keyed numbers.

timm parses its own policies (RandAugment, AutoAugment, 3-Augment, AugMix), so operations, settings
and defaults are timm's. TrivialAugment, which timm does not have, is torchvision's. Sources:
AutoAugment, arXiv 1805.09501; RandAugment, 1909.13719; AugMix, 1912.02781, without its split loss;
TrivialAugment (wide), 2103.10158; 3-Augment, of DeiT III, 2204.07118. PixMix and PRIME have files of
their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.names import TRIVIAL, check_policy
from dad_fast.data.augment.pixmix import PixMix, PixMixed
from dad_fast.data.augment.policy import AUGMIX_ARGUMENTS, Branches, Op, TimmOp, with_filter
from dad_fast.data.augment.prime import Prime, PrimeChains
from dad_fast.keyed_random import Draws

# Several images made from one, and how they are put together
Blend = Branches | PixMixed | PrimeChains


class Sampled(NamedTuple):
    """Operations in order, or a blend."""

    ops: tuple[Op, ...] = ()
    blend: Blend | None = None


class Policy(Protocol):
    """A distribution of operations."""

    @property
    def most_ops(self) -> int:
        """The most operations that `Sampled.ops` can hold."""

    def sample(self, draws: Draws, interpolation: str, img_size: int) -> Sampled:
        """Draw operations.

        An empty `interpolation` draws bilinear or bicubic for each geometric operation.
        """


@lru_cache(maxsize=8)
def parse_policy(text: str, pictures: str = "") -> Policy:
    """Parse `--aa`. Raises UsageError that names it.

    pictures: a folder of pictures for PixMix in place of fractals.
    """
    check_policy(text)
    if text in TRIVIAL:
        return TrivialAugment()
    name, *sections = text.split("-")
    if name == "pixmix":
        return Blending(PixMix.parse(sections, pictures))
    if name == "prime":
        return Blending(Prime.parse(sections))
    # Imports torch.
    from timm.data import auto_augment as timm

    if text.startswith("rand"):
        rand = timm.rand_augment_transform(text, hparams={})
        weights = rand.choice_weights
        return RandAugment(
            ops=tuple(map(TimmOp.of, rand.ops)),
            weights=None if weights is None else tuple(float(w) for w in weights),
            num_ops=rand.num_layers,
        )
    if text.startswith("augmix"):
        mix = timm.augment_and_mix_transform(text, hparams={})
        return AugMix(tuple(map(TimmOp.of, mix.ops)), mix.alpha, mix.width, mix.depth)
    auto = timm.auto_augment_transform(text, hparams={})
    return AutoAugment(tuple(tuple(map(TimmOp.of, ops)) for ops in auto.policy))


def uses_color_jitter(aug: AugmentConfig) -> bool:
    """Return whether colour jitter follows the policy: without one, or with timm's 3-Augment."""
    return aug.color_jitter > 0 and (not aug.aa or "3a" in aug.aa)


def most_operations(aug: AugmentConfig) -> int:
    """Return the most operations in `AugmentRecord.ops` of this augmentation."""
    policy = parse_policy(aug.aa).most_ops if aug.aa else 0
    return policy + (3 if uses_color_jitter(aug) else 0)


@dataclass(frozen=True)
class RandAugment:
    """`num_ops` draws from `ops`.

    With `weights` the draws are without replacement; with None they are uniform, with replacement.
    """

    ops: tuple[TimmOp, ...]
    weights: tuple[float, ...] | None
    num_ops: int

    @property
    def most_ops(self) -> int:
        return self.num_ops

    def sample(self, draws: Draws, interpolation: str, img_size: int) -> Sampled:
        return Sampled(_drawn(self._choose(draws), draws, interpolation))

    def _choose(self, draws: Draws) -> list[TimmOp]:
        if self.weights is None:
            return [self.ops[draws.below(len(self.ops))] for _ in range(self.num_ops)]
        weights = list(self.weights)
        chosen = []
        for _ in range(min(self.num_ops, len(weights))):
            index = draws.pick(weights)
            chosen.append(self.ops[index])
            weights[index] = 0.0
        return chosen


@dataclass(frozen=True)
class AutoAugment:
    """One of several sub-policies, each one or two operations; 3-Augment has three of one."""

    sub_policies: tuple[tuple[TimmOp, ...], ...]

    @property
    def most_ops(self) -> int:
        return max(map(len, self.sub_policies))

    def sample(self, draws: Draws, interpolation: str, img_size: int) -> Sampled:
        chosen = self.sub_policies[draws.below(len(self.sub_policies))]
        return Sampled(_drawn(chosen, draws, interpolation))


@dataclass(frozen=True)
class AugMix:
    """`width` chains of `depth` operations (1 to 3 where `depth` is not above 0)."""

    ops: tuple[TimmOp, ...]
    alpha: float
    width: int
    depth: int
    most_ops: int = 0

    def sample(self, draws: Draws, interpolation: str, img_size: int) -> Sampled:
        weights = draws.dirichlet(self.alpha, self.width)
        share = draws.beta(self.alpha)
        chains = []
        for _ in range(self.width):
            depth = self.depth if self.depth > 0 else 1 + draws.below(3)
            chosen = [self.ops[draws.below(len(self.ops))] for _ in range(depth)]
            ops = (op.draw(draws, interpolation, AUGMIX_ARGUMENTS) for op in chosen)
            chains.append(tuple(op for op in ops if op is not None))
        return Sampled(blend=Branches(tuple(chains), weights, share))


@dataclass(frozen=True)
class Blending:
    """A policy that blends images and applies no operation to the whole."""

    policy: PixMix | Prime
    most_ops: int = 0

    def sample(self, draws: Draws, interpolation: str, img_size: int) -> Sampled:
        return Sampled(blend=self.policy.draw(draws, interpolation, img_size))


class TrivialAugment:
    """One operation at one of 31 even magnitudes, as torchvision's TrivialAugmentWide."""

    most_ops = 1

    def sample(self, draws: Draws, interpolation: str, img_size: int) -> Sampled:
        names = list(TRIVIAL_ARGUMENTS)
        chosen = names[draws.below(len(names))]
        name, argument = TRIVIAL_ARGUMENTS[chosen]
        if chosen == "Identity":
            return Sampled()
        value = argument(draws.below(31), draws, img_size)
        return Sampled((with_filter(name, value, draws, interpolation),))


def _drawn(ops: list[TimmOp] | tuple[TimmOp, ...], draws: Draws, filter: str) -> tuple[Op, ...]:
    found = (op.draw(draws, filter) for op in ops)
    return tuple(op for op in found if op is not None)


def _unused(bin: int, draws: Draws, img_size: int) -> float:
    return 0.0


def _enhance(bin: int, draws: Draws, img_size: int) -> float:
    return 1.0 + draws.signed(0.99 * bin / 30)


def _shear(bin: int, draws: Draws, img_size: int) -> float:
    return draws.signed(0.99 * bin / 30)


def _translate(bin: int, draws: Draws, img_size: int) -> float:
    """Up to 32 whole pixels, whatever the size."""
    return draws.signed(int(32 * bin / 30) / img_size)


def _rotate(bin: int, draws: Draws, img_size: int) -> float:
    return draws.signed(135.0 * bin / 30)


def _posterize(bin: int, draws: Draws, img_size: int) -> float:
    return 8 - round(bin / 5)


def _solarize(bin: int, draws: Draws, img_size: int) -> float:
    """torchvision's threshold from 255 down to 0, as a whole number."""
    return math.ceil(255 - 8.5 * bin)


# torchvision's operation -> (name in a record, function of the magnitude's bin, 0 … 30).
TRIVIAL_ARGUMENTS: dict[str, tuple[str, Callable[[int, Draws, int], float]]] = {
    "Identity": ("identity", _unused),
    "ShearX": ("shear_x", _shear),
    "ShearY": ("shear_y", _shear),
    "TranslateX": ("translate_x", _translate),
    "TranslateY": ("translate_y", _translate),
    "Rotate": ("rotate", _rotate),
    "Brightness": ("brightness", _enhance),
    "Color": ("color", _enhance),
    "Contrast": ("contrast", _enhance),
    "Sharpness": ("sharpness", _enhance),
    "Posterize": ("posterize", _posterize),
    "Solarize": ("solarize", _solarize),
    "AutoContrast": ("auto_contrast", _unused),
    "Equalize": ("equalize", _unused),
}
