"""EvalSet: images of one or several sources, and the outputs that compete and are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.subset import Subset
from dad_fast.evaluation.suites.imagenet import alexnet_errors


@dataclass(frozen=True)
class SuiteOptions:
    """Options for opening a test set.

    allow_partial: accept an incomplete test set, with a note.
    c_preprocessing: "none" or "resize256", for ImageNet-C.
    max_bad_share: share of unreadable images above which opening fails.
    """

    allow_partial: bool = False
    c_preprocessing: str = "none"
    max_bad_share: float = 0.01


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Images of a suite and how to evaluate a model on them.

    pieces: evaluated one after the other. Their labels are positions among the competing outputs,
        or rows of `accepted`, or -1 for an image of none of the model's classes.
    classes: the model's. known: False where they are not (images of unknown classes).
    columns: int64 [K], the outputs that compete; None = all. See `metrics.image_scores`.
    accepted: bool [G, K], the competing outputs that are right for each label. See there as well.
    parts: (corruption, severity) of each piece, where there are several.
    view: share of the resized image kept and filter, where the suite fixes them; None = the
        model's. `view_for` gives the whole view.
    note: for the reader of the results: masked outputs, missing images.
    """

    name: str
    pieces: tuple[Subset, ...]
    classes: ClassMap
    columns: np.ndarray | None = None
    accepted: np.ndarray | None = None
    parts: tuple[tuple[str, int], ...] = ()
    view: tuple[float, str] | None = None
    note: str = ""
    known: bool = True

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @property
    def fingerprint(self) -> str:
        prints = [piece.fingerprint for piece in self.pieces]
        return prints[0] if len(prints) == 1 else sha256(" ".join(prints).encode()).hexdigest()

    def view_for(self, own: View) -> View:
        """Return the view of these images for a model whose own view is `own`."""
        return View(own.image_size, *self.view) if self.view else own

    def output_of(self, labels: np.ndarray) -> np.ndarray:
        """Return the model's output for each label: the first of several, -1 for none."""
        if self.accepted is not None:
            labels = np.where(labels >= 0, self.accepted.argmax(axis=1)[labels], -1)
        return labels if self.columns is None else np.where(labels >= 0, self.columns[labels], -1)


def image_numbers(pieces: Sequence[Subset]) -> list[np.ndarray]:
    """Number the images of each piece, int64 [N]. Images with the same key get the same number.

    In ImageNet-C these are versions of the same picture.
    """
    if len(pieces) == 1:
        return [pieces[0].rows]
    number: dict[str, int] = {}
    return [
        np.array([number.setdefault(key, len(number)) for key in piece.keys], dtype=np.int64)
        for piece in pieces
    ]


def as_eval_set(source: Source | EvalSet) -> EvalSet:
    """Wrap a plain source: all images, all outputs compete, a label is an output."""
    if isinstance(source, EvalSet):
        return source
    images = Subset(source, np.arange(len(source)), source.labels)
    return EvalSet(source.name, (images,), source.classes)


def corruption_summary(
    eval_set: EvalSet, top1: Sequence[float]
) -> tuple[dict[str, list[float]], np.ndarray | None]:
    """Return top-1 by corruption, one value per severity, and each part's weight in the mCE.

    top1: in percent, by part. The mCE is the sum over parts of weight * (100 - top1). The weights
    are None where a corruption of the mCE is missing, or the model lacks ImageNet's 1000 classes,
    for which AlexNet's errors are known.
    """
    by_corruption: dict[str, list[float]] = {}
    for (name, _), value in zip(eval_set.parts, top1, strict=True):
        by_corruption.setdefault(name, []).append(value)
    alexnet = alexnet_errors()
    complete = all(len(by_corruption.get(name, ())) == 5 for name in alexnet)
    if len(eval_set.classes) < 1000 or not complete:
        return by_corruption, None
    weights = [
        1 / (5 * alexnet[name] * len(alexnet)) if name in alexnet else 0.0
        for name, _ in eval_set.parts
    ]
    return by_corruption, np.array(weights)
