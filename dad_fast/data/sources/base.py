"""What a loader reads from: a list of labelled images that are read one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from dad_fast.data.classes import ClassMap


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
