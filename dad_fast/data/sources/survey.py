"""Images, bytes and classes of a training set, without reading an image or writing an index."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dad_fast.config.schema import DataConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Listed
from dad_fast.data.sources.folder import find_folder
from dad_fast.data.sources.index import scan_folder
from dad_fast.data.sources.splits import find_split, list_split, num_held_out, open_split
from dad_fast.data.sources.unlabelled import has_no_classes


class DataFacts(NamedTuple):
    """A training set. num_bytes: of its files, 0 if it has none."""

    name: str
    num_images: int
    num_bytes: int
    num_classes: int


def survey(data: DataConfig) -> DataFacts:
    """Count the training images, without those held out for validation.

    Raises the errors of a run for data that is not there.
    """
    listed = _list_training(data)
    if listed is None:
        source = open_split(data, data.train_split)
        return DataFacts(source.name, len(source), 0, len(source.classes))
    name, classes, entries = listed
    num_bytes, num_images = sum(entry.size for entry in entries), len(entries)
    if find_split(data, data.train_split).part:
        kept = num_images - _num_held_out((entry.label for entry in entries), data.val_fraction)
        num_bytes, num_images = num_bytes * kept // max(1, num_images), kept
    if data.extra_data:
        further, _ = scan_folder(Path(data.extra_data), [""])
        name = f"{name} + {data.extra_data}"
        num_bytes, num_images = (
            num_bytes + sum(entry.size for entry in further),
            num_images + len(further),
        )
    return DataFacts(name, num_images, num_bytes, len(classes))


def _list_training(data: DataConfig) -> Listed | None:
    """Return the training images, with those held out, if the source can be listed."""
    if not has_no_classes(data):
        return list_split(data, data.train_split)
    folder = find_folder(Path(data.data_dir), find_split(data, data.train_split).name)
    return Listed(str(folder), ClassMap.from_csv(data.class_map), scan_folder(folder, [""])[0])


def _num_held_out(labels: Iterable[str], fraction: float) -> int:
    _, counts = np.unique(list(labels), return_counts=True)
    return int(num_held_out(counts, fraction).sum())
