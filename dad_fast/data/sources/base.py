"""What a loader reads from: a list of labelled images that are read one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dad_fast.data.classes import ClassMap
from dad_fast.errors import UsageError

EMBEDDED = "embedded:"


class Source(Protocol):
    """A labelled data set. Sources are pickled to the loader's processes, so they hold plain data and no open files."""

    name: str
    classes: ClassMap
    keys: Sequence[str]  # a name for each sample that never changes
    labels: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int32 [N, 2], width and height
    ok: np.ndarray  # bool [N]; False where the index found the file unreadable
    fingerprint: str  # changes when a sample does
    max_bad_share: float

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """The image in mode RGB. Raises DecodeError, which names the file."""

    def encoded(self, index: int) -> bytes | None:
        """The file as it is stored, for a decoder other than PIL, where the index found it a plain JPEG (`decode.image_format`) and its
        size in bytes is still the index's. None otherwise: then only `read` knows the image.
        """

    def describe(self) -> str:
        """One line for the log."""


def is_split(data_dir: str, split: str) -> bool:
    """Whether a folder, or the first shard of a pattern, is there."""
    from dad_fast.data.sources.tar import find_shards

    if (Path(data_dir) / split).is_dir():
        return True
    shards = find_shards(data_dir, split) if split.endswith(".tar") else None
    return shards is not None and (shards[0] / shards[1][0]).is_file()


def open_source(
    data_dir: str,
    split: str = "",
    class_map: str = "",
    *,
    classes: ClassMap | None = None,
    max_bad_share: float = 0.01,
) -> Source:
    """Open a split of an image folder, of WebDataset shards or of the embedded set.

    Args:
        data_dir: a folder, a pattern of shards such as `/data/train-{000000..000099}.tar`, or `embedded:digits`.
        split: a sub-folder of it, a pattern of shards in it, or an embedded split; empty = `data_dir` itself holds the class folders or
            shards. A folder with shards and no sub-folder is read as shards.
        class_map: a CSV that fixes the classes; `classes` does the same with a recorded list. Without either the list is that of
            the folders, sorted, or for shards the class numbers themselves.
        max_bad_share: share of unreadable images above which this raises.

    Raises:
        UsageError: no data directory is named, or there is no such embedded set or split.
        DataError: no such folder or shard, a damaged shard, no images in a class, a class list that disagrees, too many unreadable images.
    """
    if not data_dir:
        raise UsageError("no data: name an image folder, shards or embedded:digits (--data-dir)")
    fixed = ClassMap.from_csv(class_map) if class_map else classes
    if data_dir.startswith(EMBEDDED):
        from dad_fast.data.sources.embedded import EmbeddedSource

        if data_dir != "embedded:digits":
            raise UsageError(f"no embedded set {data_dir!r}; there is embedded:digits (--data-dir)")
        source = EmbeddedSource(split)
        if fixed is not None and fixed.folders != source.classes.folders:
            raise UsageError(
                "embedded:digits has the classes 0 to 9; the class list names others (--class-map)"
            )
        return source
    from dad_fast.data.sources.folder import FolderSource
    from dad_fast.data.sources.tar import TarSource, find_shards

    if shards := find_shards(data_dir, split):
        return TarSource(*shards, fixed, max_bad_share)
    return FolderSource(Path(data_dir), split, fixed, max_bad_share)
