"""What a suite judges: images of one or several sources, and which of a model's outputs compete and are right for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from PIL import Image

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Source
from dad_fast.evaluate.suites.imagenet import alexnet_errors


class Subset:
    """Some images of a source, with other labels: a source itself, as loaders read it.

    rows: int64 [N], which images of `base`. labels: int64 [N]. border: pixels cut off on each side of an image.
    """

    def __init__(self, base: Source, rows: np.ndarray, labels: np.ndarray, border: int = 0) -> None:
        self.base, self.rows, self.labels, self.border = base, rows, labels, border
        self.name, self.classes, self.fingerprint, self.max_bad_share = (
            base.name,
            base.classes,
            base.fingerprint,
            base.max_bad_share,
        )
        self.ok, self.sizes = base.ok[rows], base.sizes[rows]
        self.keys: Sequence[str] = _Keys(base.keys, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Image.Image:
        image = self.base.read(int(self.rows[index]))
        if not self.border:
            return image
        return image.crop(
            (self.border, self.border, image.width - self.border, image.height - self.border)
        )

    def encoded(self, index: int) -> bytes | None:
        return None if self.border else self.base.encoded(int(self.rows[index]))

    def describe(self) -> str:
        return self.base.describe()

    def taken(self, chosen: np.ndarray | slice) -> Subset:
        return Subset(self.base, self.rows[chosen], self.labels[chosen], self.border)


class _Keys(Sequence[str]):
    """Some of a source's keys, not copied."""

    def __init__(self, keys: Sequence[str], rows: np.ndarray) -> None:
        self._keys, self._rows = keys, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._keys[int(row)] for row in self._rows[index]]
        return self._keys[int(self._rows[index])]


@dataclass(frozen=True, eq=False)
class EvalSet:
    """The images of a suite and how they are judged. `pieces` are judged one after the other; `parts` says what each of several is:
    a corruption and its severity.

    columns, accepted: see `metrics.image_scores`, as numpy arrays; the pieces' labels are places among the outputs that compete, or
        rows of `accepted`, or -1 where an image is of none of the model's classes.
    view: share of the resized image kept and filter, where the suite fixes them; None = the model's own.
    note: what a reader must know: masked outputs, what is missing.
    """

    name: str
    pieces: tuple[Subset, ...]
    classes: ClassMap
    columns: np.ndarray | None = None
    accepted: np.ndarray | None = None
    parts: tuple[tuple[str, int], ...] = ()
    view: tuple[float, str] | None = None
    note: str = ""

    known: bool = True  # whether `classes` are the model's

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @property
    def fingerprint(self) -> str:
        prints = [piece.fingerprint for piece in self.pieces]
        return prints[0] if len(prints) == 1 else sha256(" ".join(prints).encode()).hexdigest()

    def output_of(self, labels: np.ndarray) -> np.ndarray:
        """The output of the model that a piece's label means, of several the first; -1 where there is none."""
        if self.accepted is not None:
            labels = np.where(labels >= 0, self.accepted.argmax(axis=1)[labels], -1)
        return labels if self.columns is None else np.where(labels >= 0, self.columns[labels], -1)


def image_numbers(pieces: Sequence[Subset]) -> list[np.ndarray]:
    """For each piece a number for every image, int64 [N]: the same where the keys are, which in ImageNet-C are the same picture."""
    if len(pieces) == 1:
        return [pieces[0].rows]
    number: dict[str, int] = {}
    return [
        np.array([number.setdefault(key, len(number)) for key in piece.keys], dtype=np.int64)
        for piece in pieces
    ]


def as_eval_set(source: Source | EvalSet) -> EvalSet:
    """A plain source: all its images, all outputs compete, a label is an output."""
    if isinstance(source, EvalSet):
        return source
    return EvalSet(
        source.name, (Subset(source, np.arange(len(source)), source.labels),), source.classes
    )


def corruption_summary(
    judged: EvalSet, top1: Sequence[float]
) -> tuple[dict[str, list[float]], np.ndarray | None]:
    """Top-1 by corruption, a value a severity; and the weight of each part in the mean corruption error: None where one of those that it
    takes is missing, or the model has not ImageNet's 1000 classes, which AlexNet's errors are of.

    top1: in percent, by part. The mCE is the sum over parts of weight * (100 - top1).
    """
    by_corruption: dict[str, list[float]] = {}
    for (name, _), value in zip(judged.parts, top1, strict=True):
        by_corruption.setdefault(name, []).append(value)
    alexnet = alexnet_errors()
    if len(judged.classes) < 1000 or any(len(by_corruption.get(name, ())) != 5 for name in alexnet):
        return by_corruption, None
    weights = np.array(
        [
            1 / (5 * alexnet[name] * len(alexnet)) if name in alexnet else 0.0
            for name, _ in judged.parts
        ]
    )
    return by_corruption, weights
