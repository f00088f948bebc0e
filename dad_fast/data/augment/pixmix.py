"""PixMix (arXiv 2112.05135) as data: rounds that mix an image with a picture or with itself.

Defaults are those of the authors' code for ImageNet: at most 4 rounds, strength 4, magnitude 1, all
operations. Their pictures are downloaded; ours are fractals (fractals.py) or the user's own. Pixels
that no image covers have this project's FILL, where the authors' are black.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dad_fast.data.augment.policy import Op, with_filter
from dad_fast.data.sources.decode import EXTENSIONS, open_image, reason
from dad_fast.data.sources.names import shown
from dad_fast.errors import DataError
from dad_fast.keyed_random import Draws

# Number of different fractals; colours and crop differ in each record.
FRACTALS = 1024
ANCHORS = 4

RGB = tuple[int, int, int]


class Picture(NamedTuple):
    """A picture to mix in, cropped to the image's size.

    file: of the user's pictures; empty for the fractal of this number. colours: of a fractal, evenly
    spaced from its empty to its densest parts. left, top: place of the crop, as shares of the room.
    """

    file: str
    fractal: int
    colours: tuple[RGB, ...]
    left: float
    top: float


class Round(NamedTuple):
    """One mixing: `kind` is add or multiply, with the coefficients of both images.

    op: makes the other image from the own one; None takes the picture.
    """

    kind: str
    own: float
    other: float
    op: Op | None


class PixMixed(NamedTuple):
    """first: operation on the image that the rounds begin with, if any."""

    first: Op | None
    rounds: tuple[Round, ...]
    picture: Picture


@dataclass(frozen=True)
class PixMix:
    """`rounds`: the most rounds. strength: of the mixing. magnitude: of the operations, 1 to 10."""

    rounds: int = 4
    strength: int = 4
    magnitude: int = 1
    all_ops: bool = True
    pictures: str = ""

    @classmethod
    def parse(cls, sections: Sequence[str], pictures: str) -> PixMix:
        """Parse the checked sections of `pixmix-k4-b4-m1-all1`."""
        found: dict[str, int] = {}
        for section in sections:
            key = section.rstrip("0123456789")
            found[key] = int(section.removeprefix(key))
        return cls(
            rounds=found.get("k", cls.rounds),
            strength=found.get("b", cls.strength),
            magnitude=found.get("m", cls.magnitude),
            all_ops=bool(found.get("all", cls.all_ops)),
            pictures=pictures,
        )

    def draw(self, draws: Draws, interpolation: str, img_size: int) -> PixMixed:
        first = self._operation(draws, interpolation, img_size) if draws.chance(0.5) else None
        rounds = []
        for _ in range(draws.below(self.rounds + 1)):
            op = self._operation(draws, interpolation, img_size) if draws.chance(0.5) else None
            kind = ("add", "multiply")[draws.below(2)]
            rounds.append(Round(kind, *_coefficients(draws, self.strength), op))
        return PixMixed(first, tuple(rounds), self._picture(draws))

    def _operation(self, draws: Draws, interpolation: str, img_size: int) -> Op:
        names = OPERATIONS if self.all_ops else OPERATIONS[:-IN_IMAGENET_C]
        name, argument = names[draws.below(len(names))]
        level = draws.between(0.1, self.magnitude) / 10.0
        return with_filter(name, argument(level, draws, img_size), draws, interpolation)

    def _picture(self, draws: Draws) -> Picture:
        left, top = draws.uniform(), draws.uniform()
        if self.pictures:
            files = picture_files(self.pictures)
            return Picture(files[draws.below(len(files))], 0, (), left, top)
        number = draws.below(FRACTALS)
        # The empty parts are dark, as in the usual pictures of fractals.
        limits = (64, *[256] * (ANCHORS - 1))
        colours = tuple((draws.below(n), draws.below(n), draws.below(n)) for n in limits)
        return Picture("", number, colours, left, top)


@lru_cache(maxsize=4)
def picture_files(folder: str) -> tuple[str, ...]:
    """List the pictures in a folder and below, in a fixed order. Raises DataError for none."""
    if not Path(folder).is_dir():
        raise DataError(f"--pixmix-pictures {folder}: no such folder; check the path")
    files = (path for path in Path(folder).rglob("*") if path.suffix.lower() in EXTENSIONS)
    found = sorted(map(str, files))
    if not found:
        raise DataError(f"--pixmix-pictures {folder}: no image in it; check the path")
    return tuple(found)


def check_pictures(folder: str) -> None:
    """Open every picture, without decoding. Raises DataError for one that is none."""
    for file in picture_files(folder):
        try:
            with open_image(file):
                pass
        except Exception as error:  # PIL's many types, see decode.py
            raise unreadable(file, error) from error


def unreadable(file: str, error: Exception) -> DataError:
    return DataError(f"--pixmix-pictures: {shown(file)}: {reason(error)}; remove it")


def picture_fingerprint(folder: str) -> str:
    """Return a hash of the pictures' names and sizes; empty for no folder."""
    if not folder:
        return ""
    found = [
        f"{Path(file).relative_to(folder)} {Path(file).stat().st_size}"
        for file in picture_files(folder)
    ]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _coefficients(draws: Draws, strength: int) -> tuple[float, float]:
    """Draw the coefficients of the own and of the other image.

    Half of the time a mean of both, else a difference. Beta(n, 1) is U^(1/n), and Beta(1, n) is
    1 - U^(1/n).
    """
    is_mean = draws.chance(0.5)
    near_one, near_zero = draws.uniform() ** (1 / strength), 1 - draws.uniform() ** (1 / strength)
    return (near_one, near_zero) if is_mean else (2.0 - near_one, -near_zero)


Argument = Callable[[float, Draws, int], float]


def _none(level: float, draws: Draws, img_size: int) -> float:
    return 0.0


def _shear(level: float, draws: Draws, img_size: int) -> float:
    return draws.signed(level * 0.3)


def _translate(level: float, draws: Draws, img_size: int) -> float:
    """Whole pixels, up to a third of the side, as a share of it."""
    return draws.signed(int(level * img_size / 3) / img_size)


def _enhance(level: float, draws: Draws, img_size: int) -> float:
    return level * 1.8 + 0.1


# Name in a record, and its argument from a level in 0 … 1, the draws and the side.
OPERATIONS: tuple[tuple[str, Argument], ...] = (
    ("auto_contrast", _none),
    ("equalize", _none),
    ("posterize", lambda level, draws, img_size: 4 - int(level * 4)),
    ("rotate", lambda level, draws, img_size: draws.signed(int(level * 30))),
    ("solarize", lambda level, draws, img_size: 256 - int(level * 256)),
    ("shear_x", _shear),
    ("shear_y", _shear),
    ("translate_x", _translate),
    ("translate_y", _translate),
    ("color", _enhance),
    ("contrast", _enhance),
    ("brightness", _enhance),
    ("sharpness", _enhance),
)
# The last ones are like corruptions of ImageNet-C.
IN_IMAGENET_C = 4
