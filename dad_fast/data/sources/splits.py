"""Splits of a data set: `train` and `val`, also under other names, or a held-out share of `train`.

With `data.val_fraction` and without a `val` split, a share of the training images of each class is
held out for validation. Which ones follows from the images' keys alone, so it is the same for every
seed, on every machine, on resume, for stores and for `dad-fast eval`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dad_fast.config.schema import DataConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Listed, Source
from dad_fast.data.sources.registry import (
    OTHER_NAMES,
    find_listing,
    is_named,
    is_split,
    open_source,
)
from dad_fast.data.sources.subset import Subset
from dad_fast.errors import DataError, UsageError


class Split(NamedTuple):
    """A split where the data has it.

    name: of the folder, the shards or the split of a named source. part: the images of it: all
    (""), those trained on ("train"), or those held out ("val").
    """

    name: str
    part: str = ""


class Part(Subset):
    """The images of a split that are trained on, or that are held out for validation."""

    def __init__(self, base: Source, part: str, fraction: float) -> None:
        held = held_out(base.keys, base.labels, base.ok, fraction)
        rows = np.flatnonzero(held if part == "val" else ~held)
        super().__init__(base, rows, base.labels[rows])
        digest = hashlib.sha256(f"{base.fingerprint} {part}\n".encode())
        digest.update(np.packbits(held).tobytes())
        self.fingerprint = digest.hexdigest()
        verb = "held out" if part == "val" else "without those held out"
        self.about = f"{verb} for validation (--val-fraction {fraction:g})"

    def describe(self) -> str:
        return (
            f"{self.name}: {len(self):,} of its {len(self.base):,} images, of "
            f"{len(self.classes):,} classes, {self.about}"
        )


def open_split(data: DataConfig, split: str, classes: ClassMap | None = None) -> Source:
    """Open a split of `data.data_dir`: `data.train_split`, `data.val_split` or any other.

    classes: a recorded class list, instead of `data.class_map`. Raises the errors of `open_source`.
    """
    found = find_split(data, split)
    source = open_source(
        data.data_dir,
        found.name,
        "" if classes is not None else data.class_map,
        classes=classes,
        max_bad_share=data.max_bad_share,
    )
    return Part(source, found.part, data.val_fraction) if found.part else source


def find_split(data: DataConfig, split: str) -> Split:
    """Return where the data has a split; its own name if it is nowhere."""
    if split in (data.train_split, data.val_split) and _holds_out(data):
        part = "train" if split == data.train_split else "val"
        return Split(_existing(data, data.train_split) or data.train_split, part)
    return Split(_existing(data, split) or split)


def has_split(data: DataConfig, split: str) -> bool:
    """Return whether the data's folder has this split, under some name or as a held-out share."""
    if not data.data_dir or is_named(data.data_dir):
        return False
    found = find_split(data, split)
    return bool(found.part) or is_split(data.data_dir, found.name)


def list_split(data: DataConfig, split: str) -> Listed | None:
    """Return the images of a split, not verified; None for a source that cannot be listed. Writes
    no index.

    Raises UsageError for a missing split, DataError for a list that cannot be read.
    """
    listing = find_listing(data.data_dir)
    if listing is None:
        return None
    fixed = ClassMap.from_csv(data.class_map) if data.class_map else None
    return listing.images(find_split(data, split).name, fixed)


def held_out(
    keys: Sequence[str], labels: np.ndarray, ok: np.ndarray, fraction: float
) -> np.ndarray:
    """Return which images are held out, bool [N]: a share of the readable ones of each class.

    Every class with two images or more has one on each side.
    """
    texts = (key.encode("utf-8", "surrogateescape") for key in keys)
    digests = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) for text in texts]
    rows = np.flatnonzero(ok)
    by_class = rows[np.lexsort((np.array(digests, dtype=np.uint64)[rows], labels[rows]))]
    counts = np.bincount(labels[rows])
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(labels), dtype=bool)
    held[by_class] = rank < num_held_out(counts, fraction)[labels[by_class]]
    return held


def num_held_out(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Return the number of held-out images of classes with `counts` images; both int64 [C]."""
    wanted = np.maximum(1, np.rint(fraction * counts)).astype(np.int64)
    return np.clip(wanted, 0, np.maximum(counts - 1, 0))


def _holds_out(data: DataConfig) -> bool:
    """Return whether a share of the training images is held out: there is no other val split."""
    return bool(data.val_fraction) and _existing(data, data.val_split) is None


def _existing(data: DataConfig, split: str) -> str | None:
    """Return the name under which the data has a split, None if it has none.

    The splits of a source without a listing are known only to the source: where they matter it is
    opened.
    """
    listing = find_listing(data.data_dir)
    if listing is None:
        if not data.val_fraction:
            return split
        try:
            open_source(data.data_dir, split, data.class_map, max_bad_share=1.0)
        except (UsageError, DataError):
            return None
        return split
    others = OTHER_NAMES.get(split, ())
    if data.val_fraction:
        # The user asks for validation images of the training set: test images stay unseen.
        others = tuple(name for name in others if name != "test")
    names = (split, *others)
    return next((name for name in names if listing.has_split(name)), None)
