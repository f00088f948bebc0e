"""RandAugment as data: from timm's policy strings to operations with their final arguments.

timm parses the policy, so transform sets and defaults are timm's own. This module draws, from keyed
numbers, what timm draws while it works on the pixels: which operations, whether each is applied,
its magnitude, sign and resampling filter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dad_fast.errors import UsageError
from dad_fast.keyed_random import Draws

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_SECTION = re.compile(r"(m|n|inc|mmax)\d+|(p|mstd)\d+(\.\d+)?|t(weights|3a|3aw)")


class Op(NamedTuple):
    """One operation.

    `value` by name: rotate, degrees counter-clockwise; shear_x, shear_y, x += value*y; translate_x,
    translate_y, share of the side; posterize, bits kept; solarize, threshold; solarize_add, addend
    below 128; color, contrast, brightness, sharpness, factor; gaussian_blur, radius; auto_contrast,
    equalize, invert, unused. `interpolation` is set for geometric operations only.
    """

    name: str
    value: float
    interpolation: str


@dataclass(frozen=True)
class Policy:
    """A parsed policy: `num_ops` draws from `names`.

    With `weights` the draws are without replacement; with None they are uniform, with replacement.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    num_ops: int
    prob: float
    magnitude: float
    magnitude_std: float
    magnitude_max: float


@lru_cache(maxsize=8)
def parse_policy(text: str) -> Policy:
    """Parse a policy such as `rand-m9-mstd0.5-inc1`. Raises UsageError that names --aa."""
    kind, *sections = text.split("-")
    for section in sections if kind == "rand" else [kind]:
        if not _SECTION.fullmatch(section):
            # timm ignores a key without digits, so `mstdinf` would mean two things.
            raise UsageError(
                f"--aa {text}: cannot read {section!r}; "
                "timm writes a policy as rand-m9-mstd0.5-inc1 (m n p mstd mmax inc t; mstd101 draws "
                "the magnitude evenly from 0 to m)"
            )
    from timm.data.auto_augment import rand_augment_transform

    transform = rand_augment_transform(text, hparams={})
    op = transform.ops[0]
    weights = transform.choice_weights
    return Policy(
        names=tuple(op.name for op in transform.ops),
        weights=None if weights is None else tuple(float(w) for w in weights),
        num_ops=transform.num_layers,
        prob=op.prob,
        magnitude=op.magnitude,
        magnitude_std=op.magnitude_std,
        magnitude_max=op.magnitude_max or 10,
    )


def sample_ops(policy: Policy, draws: Draws, interpolation: str = "") -> tuple[Op, ...]:
    """Draw the operations to apply.

    An empty `interpolation` draws bilinear or bicubic for each geometric operation.
    """
    ops = []
    for name in _choose(policy, draws):
        if not draws.chance(policy.prob):
            continue
        magnitude = policy.magnitude
        if policy.magnitude_std == float("inf"):
            magnitude = draws.between(0, magnitude)
        elif policy.magnitude_std > 0:
            magnitude += policy.magnitude_std * draws.normal()
        level = max(0.0, min(magnitude, policy.magnitude_max))
        op, argument = ARGUMENTS[name]
        value = argument(level, draws)

        filter_name = ""
        if op in GEOMETRIC:
            filter_name = interpolation or ("bilinear", "bicubic")[draws.below(2)]
        ops.append(Op(op, value, filter_name))
    return tuple(ops)


def _choose(policy: Policy, draws: Draws) -> list[str]:
    if policy.weights is None:
        return [policy.names[draws.below(len(policy.names))] for _ in range(policy.num_ops)]
    weights = list(policy.weights)
    chosen = []
    for _ in range(min(policy.num_ops, len(weights))):
        index = draws.pick(weights)
        chosen.append(policy.names[index])
        weights[index] = 0.0
    return chosen


def _none(level: float, draws: Draws) -> float:
    return 0.0


def _enhance(level: float, draws: Draws) -> float:
    return level / 10.0 * 1.8 + 0.1


def _enhance_increasing(level: float, draws: Draws) -> float:
    return max(0.1, 1.0 + draws.signed(level / 10.0 * 0.9))


def _shear(level: float, draws: Draws) -> float:
    return draws.signed(level / 10.0 * 0.3)


def _translate(level: float, draws: Draws) -> float:
    return draws.signed(level / 10.0 * 0.45)


def _share(level: float, low: float, high: float) -> float:
    return max(low, min(high, low + (high - low) * (level / 10.0)))


# timm's operation -> (name in a record, function from a level in 0 … 10 (or mmax) to the argument).
ARGUMENTS: dict[str, tuple[str, Callable[[float, Draws], float]]] = {
    "AutoContrast": ("auto_contrast", _none),
    "Equalize": ("equalize", _none),
    "Invert": ("invert", _none),
    "Rotate": ("rotate", lambda level, draws: draws.signed(level / 10.0 * 30.0)),
    "Posterize": ("posterize", lambda level, draws: int(level / 10.0 * 4)),
    "PosterizeIncreasing": ("posterize", lambda level, draws: 4 - int(level / 10.0 * 4)),
    "Solarize": ("solarize", lambda level, draws: min(256, int(level / 10.0 * 256))),
    "SolarizeIncreasing": (
        "solarize",
        lambda level, draws: 256 - min(256, int(level / 10.0 * 256)),
    ),
    "SolarizeAdd": ("solarize_add", lambda level, draws: min(128, int(level / 10.0 * 110))),
    "Color": ("color", _enhance),
    "ColorIncreasing": ("color", _enhance_increasing),
    "Contrast": ("contrast", _enhance),
    "ContrastIncreasing": ("contrast", _enhance_increasing),
    "Brightness": ("brightness", _enhance),
    "BrightnessIncreasing": ("brightness", _enhance_increasing),
    "Sharpness": ("sharpness", _enhance),
    "SharpnessIncreasing": ("sharpness", _enhance_increasing),
    "ShearX": ("shear_x", _shear),
    "ShearY": ("shear_y", _shear),
    "TranslateXRel": ("translate_x", _translate),
    "TranslateYRel": ("translate_y", _translate),
    "Desaturate": ("color", lambda level, draws: 1.0 - _share(level, 0.5, 1.0)),
    "GaussianBlur": ("gaussian_blur", lambda level, draws: _share(level, 0.1, 2.0)),
}
