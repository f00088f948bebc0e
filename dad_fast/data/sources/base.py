"""Interface of a data source: a list of labelled images that are read one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from PIL import Image

from dad_fast.data.classes import ClassMap

if TYPE_CHECKING:
    from dad_fast.data.sources.index import Entry

# Label of an image without one.
UNLABELLED = -1


class Source(Protocol):
    """A labelled data set, or images to train on without labels.

    Sources are pickled to the loader's processes, so they hold plain data and no open files.
    """

    name: str
    classes: ClassMap
    keys: Sequence[str]  # a stable name for each sample
    labels: np.ndarray  # int64 [N], UNLABELLED where there is none
    sizes: np.ndarray  # int32 [N, 2], width and height
    ok: np.ndarray  # bool [N]; False where the index found the file unreadable
    fingerprint: str  # changes when a sample changes
    max_bad_share: float

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Return the image in mode RGB. Raises DecodeError that names the file."""

    def encoded(self, index: int) -> bytes | None:
        """Return the stored file for a decoder other than PIL; None where only `read` may be used.

        None unless the index found the file a plain JPEG (`decode.image_format`) and its size in
        bytes is unchanged.
        """

    def describe(self) -> str:
        """Return one line for the log."""


class Listed(NamedTuple):
    """Images of a split before an index exists, not verified. name: of the data, for the log."""

    name: str
    classes: ClassMap
    entries: list[Entry]


class Listing(Protocol):
    """Images of a source before an index exists: for checks and counts that write no index."""

    def has_split(self, split: str) -> bool: ...

    def images(self, split: str, fixed: ClassMap | None) -> Listed:
        """Return the images of a split and the class list, which is `fixed` if it is given.

        Raises UsageError without such a split, DataError for a label that is not in `fixed`.
        """

    def contents(self, split: str) -> Iterator[tuple[str, Path | BytesIO]]:
        """Yield the name of each image and what PIL opens. Needs no labels."""
