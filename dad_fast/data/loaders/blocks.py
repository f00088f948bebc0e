"""A data set in fixed blocks, for work that is done once per image.

Block b holds the samples b * size … of the source's order after the evaluation transform (no
augmentation), whatever the number of processes. The last block is filled up with its last sample,
so that all blocks have the same shapes; `num_real` counts the samples before the filling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.data.augment.execute import eval_transform
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.workers import iterate
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.decode import DecodeError


class ImageBlock(NamedTuple):
    """One block. Images are stored as NHWC behind an NCHW view; an unreadable image is black."""

    number: int
    num_real: int
    images: Tensor  # uint8 [S, 3, H, W]
    labels: Tensor  # int64 [S]
    samples: Tensor  # int64 [S], indices into the source
    readable: Tensor  # bool [S]
    unreadable: tuple[str, ...]  # files that fail although the index lists them as valid

    def pin_memory(self) -> ImageBlock:
        tensors = {
            name: value for name, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(**{name: tensor.pin_memory() for name, tensor in tensors.items()})


def num_blocks(source: Source, size: int) -> int:
    return -(-len(source) // size)


class _Blocks(Dataset[ImageBlock]):
    """Block number -> ImageBlock."""

    def __init__(self, source: Source, size: int, view: View) -> None:
        self.source, self.size, self.view = source, size, view

    def __getitem__(self, number: int) -> ImageBlock:
        source, side = self.source, self.view.image_size
        first = number * self.size
        samples = np.minimum(np.arange(first, first + self.size), len(source) - 1)
        num_real = min(self.size, len(source) - first)
        images = torch.zeros(self.size, side, side, 3, dtype=torch.uint8)
        rows = images.numpy()
        readable = source.ok[samples].copy()
        unreadable = []
        for row in range(num_real):
            if not readable[row]:
                continue
            try:
                rows[row] = eval_transform(source.read(int(samples[row])), *self.view)
            except DecodeError:
                readable[row] = False
                unreadable.append(source.keys[int(samples[row])])
        rows[num_real:] = rows[num_real - 1]
        readable[num_real:] = readable[num_real - 1]
        return ImageBlock(
            number,
            num_real,
            images.permute(0, 3, 1, 2),
            torch.from_numpy(source.labels[samples]),
            torch.from_numpy(samples),
            torch.from_numpy(readable),
            tuple(unreadable),
        )


def blocks(
    source: Source,
    numbers: Sequence[int],
    size: int,
    view: View,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[ImageBlock]:
    """Yield the blocks `numbers` in that order, made by `workers` processes (0: this process)."""
    return iterate(_Blocks(source, size, view), numbers, workers, pin_memory)
