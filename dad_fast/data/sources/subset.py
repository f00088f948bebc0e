"""Some images of a source, as a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dad_fast.data.sources.base import Source


class Subset:
    """Some images of a source with their own labels; a Source itself, as loaders read it.

    rows: int64 [N], the images of `base`. labels: int64 [N].
    border: pixels cut off on each side of an image.
    """

    def __init__(self, base: Source, rows: np.ndarray, labels: np.ndarray, border: int = 0) -> None:
        self.base = base
        self.rows = rows
        self.labels = labels
        self.border = border
        self.name = base.name
        self.classes = base.classes
        self.fingerprint = base.fingerprint
        self.max_bad_share = base.max_bad_share
        self.ok = base.ok[rows]
        self.sizes = base.sizes[rows]
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
        """Return the chosen images: a mask, indices or a slice of this subset's rows."""
        return Subset(self.base, self.rows[chosen], self.labels[chosen], self.border)


class _Keys(Sequence[str]):
    """Keys of some images of a source, without a copy."""

    def __init__(self, keys: Sequence[str], rows: np.ndarray) -> None:
        self._keys = keys
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._keys[int(row)] for row in self._rows[index]]
        return self._keys[int(self._rows[index])]
