"""Operations of augmentation policies: timm's names and magnitudes to final arguments.

A policy of timm draws while it works on the pixels: whether an operation is applied, its magnitude,
sign and resampling filter. This module draws the same from keyed numbers. policies.py holds the
policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dad_fast.keyed_random import Draws

# Colour of pixels that no image covers: 255 times the ImageNet mean, rounded.
FILL = (124, 116, 104)
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


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


class Branches(NamedTuple):
    """AugMix: chains of operations on one image, averaged and blended with that image.

    weights: of the chains, with sum 1. share: of their average in the result.
    """

    chains: tuple[tuple[Op, ...], ...]
    weights: tuple[float, ...]
    share: float


@dataclass(frozen=True)
class TimmOp:
    """An operation of a policy with the settings of timm's `AugmentOp`.

    name: a key of ARGUMENTS. The magnitude is drawn around `magnitude`, or evenly below it where
    `magnitude_std` is infinite.
    """

    name: str
    prob: float
    magnitude: float
    magnitude_std: float
    magnitude_max: float

    @classmethod
    def of(cls, op: Any) -> TimmOp:
        """Copy the settings of an `AugmentOp`."""
        numbers = (op.prob, op.magnitude, op.magnitude_std, op.magnitude_max or 10)
        return cls(op.name, *map(float, numbers))

    def draw(
        self, draws: Draws, interpolation: str, arguments: Mapping[str, Argument] | None = None
    ) -> Op | None:
        """Draw the operation; None where it is not applied.

        An empty `interpolation` draws bilinear or bicubic for a geometric operation.
        """
        if not draws.chance(self.prob):
            return None
        magnitude = self.magnitude
        if self.magnitude_std == float("inf"):
            magnitude = draws.between(0, magnitude)
        elif self.magnitude_std > 0:
            magnitude += self.magnitude_std * draws.normal()
        level = max(0.0, min(magnitude, self.magnitude_max))
        name, argument = (arguments or ARGUMENTS)[self.name]
        return with_filter(name, argument(level, draws), draws, interpolation)


def with_filter(name: str, value: float, draws: Draws, interpolation: str) -> Op:
    """Return the operation with its resampling filter, drawn where `interpolation` is empty."""
    if name not in GEOMETRIC:
        return Op(name, value, "")
    return Op(name, value, interpolation or ("bilinear", "bicubic")[draws.below(2)])


# Name in a record, function from a level in 0 … 10 (or mmax) to the argument.
Argument = tuple[str, Callable[[float, Draws], float]]


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


def _translate_less(level: float, draws: Draws) -> float:
    return draws.signed(level / 10.0 * 0.3)


def _share(level: float, low: float, high: float) -> float:
    return max(low, min(high, low + (high - low) * (level / 10.0)))


ARGUMENTS: dict[str, Argument] = {
    "AutoContrast": ("auto_contrast", _none),
    "Equalize": ("equalize", _none),
    "Invert": ("invert", _none),
    "Rotate": ("rotate", lambda level, draws: draws.signed(level / 10.0 * 30.0)),
    "Posterize": ("posterize", lambda level, draws: int(level / 10.0 * 4)),
    "PosterizeIncreasing": ("posterize", lambda level, draws: 4 - int(level / 10.0 * 4)),
    "PosterizeOriginal": ("posterize", lambda level, draws: int(level / 10.0 * 4) + 4),
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
    "GaussianBlurRand": (
        "gaussian_blur",
        lambda level, draws: draws.between(0.1, 2.0 * _share(level, 0.0, 1.0)),
    ),
}
# timm moves images less in AugMix.
AUGMIX_ARGUMENTS = ARGUMENTS | {
    "TranslateXRel": ("translate_x", _translate_less),
    "TranslateYRel": ("translate_y", _translate_less),
}
