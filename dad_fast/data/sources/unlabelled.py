"""Images without labels, alone or after a labelled set. Their label is UNLABELLED."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dad_fast.config.schema import DataConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import UNLABELLED, Source
from dad_fast.data.sources.folder import FolderSource, find_folder
from dad_fast.data.sources.index import build_index
from dad_fast.data.sources.names import PackedStrings
from dad_fast.data.sources.registry import is_named
from dad_fast.data.sources.splits import find_split, open_split
from dad_fast.data.sources.tar import find_shards

# Begins the keys of further images, which must differ from those of the labelled set.
EXTRA = "extra-data/"


def open_training(data: DataConfig, classes: ClassMap | None = None) -> Source:
    """Open the images that a run trains on.

    classes: a recorded list, as for `open_split`. Raises the errors of `open_split`.
    """
    source: Source
    if has_no_classes(data):
        folder = find_folder(Path(data.data_dir), find_split(data, data.train_split).name)
        source = UnlabelledFolder(folder, ClassMap.from_csv(data.class_map), data.max_bad_share)
    else:
        source = open_split(data, data.train_split, classes)
        if data.labels == "teacher":
            source = without_labels(source)
    if data.extra_data:
        extra = UnlabelledFolder(Path(data.extra_data), source.classes, data.max_bad_share)
        source = JoinedSource(source, extra)
    return source


def has_no_classes(data: DataConfig) -> bool:
    """Return whether the train split is read as images without class folders."""
    if data.labels != "teacher" or not data.class_map or is_named(data.data_dir):
        return False
    return not find_shards(data.data_dir, find_split(data, data.train_split).name)


class UnlabelledFolder(FolderSource):
    """All images in a folder and below, in the order of their paths."""

    def __init__(self, folder: Path, classes: ClassMap, max_bad_share: float) -> None:
        """classes: of the teacher's predictions."""
        entries = build_index(folder, None)
        labels = np.full(len(entries), UNLABELLED, dtype=np.int64)
        self._hold(folder, classes, entries, labels, max_bad_share)

    def describe(self) -> str:
        bad = int((~self.ok).sum())
        text = f"{self.name}: {len(self):,} images without labels"
        return f"{text}, {bad:,} unreadable" if bad else text


def without_labels(source: Source) -> Source:
    """Return the same images without their labels."""
    found = copy.copy(source)
    found.labels = np.full(len(source), UNLABELLED, dtype=np.int64)
    found.fingerprint = hashlib.sha256(f"{source.fingerprint}, no labels".encode()).hexdigest()
    return found


class JoinedSource:
    """The samples of a source, then those of a folder without labels, with keys of their own."""

    def __init__(self, labelled: Source, extra: UnlabelledFolder) -> None:
        self.parts: tuple[Source, Source] = (labelled, extra)
        self.name = f"{labelled.name} + {extra.name}"
        self.classes = labelled.classes
        self.keys: Sequence[str] = PackedStrings(
            [*labelled.keys, *(EXTRA + key for key in extra.keys)]
        )
        self.labels = np.concatenate([labelled.labels, extra.labels])
        self.sizes = np.concatenate([labelled.sizes, extra.sizes])
        self.ok = np.concatenate([labelled.ok, extra.ok])
        fingerprints = f"{labelled.fingerprint}\n{extra.fingerprint}"
        self.fingerprint = hashlib.sha256(fingerprints.encode()).hexdigest()
        self.max_bad_share = max(labelled.max_bad_share, extra.max_bad_share)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        source, own = self._part(index)
        return source.read(own)

    def encoded(self, index: int) -> bytes | None:
        source, own = self._part(index)
        return source.encoded(own)

    def describe(self) -> str:
        return " + ".join(part.describe() for part in self.parts)

    def _part(self, index: int) -> tuple[Source, int]:
        first = len(self.parts[0])
        return (self.parts[0], index) if index < first else (self.parts[1], index - first)
