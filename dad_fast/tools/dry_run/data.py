"""Images, bytes and classes of a training set, without reading an image or writing an index."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dad_fast.config.schema import DataConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.folder import find_folder
from dad_fast.data.sources.index import scan_folder
from dad_fast.data.sources.registry import is_named, open_source
from dad_fast.data.sources.tar import find_shards
from dad_fast.data.sources.tar_index import scan_shards
from dad_fast.data.sources.unlabelled import has_no_classes
from dad_fast.tools.dry_run.assumptions import NO_DATA


class DataFacts(NamedTuple):
    """A training set. num_bytes: of its files, 0 if it has none."""

    name: str
    num_images: int
    num_bytes: int
    num_classes: int


IMAGENET = DataFacts(
    "ImageNet-1k, assumed since there is no --data-dir", 1_281_167, 147_897_477_120, 1000
)


def survey(data: DataConfig) -> DataFacts:
    """Count the training images. Raises the errors of a run for data that is not there."""
    if data.data_dir == NO_DATA:
        return IMAGENET
    fixed = ClassMap.from_csv(data.class_map) if data.class_map else None
    if is_named(data.data_dir):
        source = open_source(data.data_dir, data.train_split, data.class_map)
        return DataFacts(source.name, len(source), 0, len(source.classes))
    shards = find_shards(data.data_dir, data.train_split)
    if shards is not None:
        entries = scan_shards(*shards)
        highest = max((int(entry.label) for entry in entries if entry.label), default=0)
        name, num_classes = f"{len(shards[1]):,} shards in {shards[0]}", highest + 1
    else:
        folder = find_folder(Path(data.data_dir), data.train_split)
        classes = fixed or ClassMap.from_folders(folder)
        entries, _ = scan_folder(folder, [""] if has_no_classes(data) else classes.folders)
        name, num_classes = str(folder), len(classes)
    if data.extra_data:
        further, _ = scan_folder(Path(data.extra_data), [""])
        entries, name = [*entries, *further], f"{name} + {data.extra_data}"
    num_bytes = sum(entry.size for entry in entries)
    return DataFacts(name, len(entries), num_bytes, len(fixed) if fixed else num_classes)
