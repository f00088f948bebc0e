"""A data set in fixed blocks, for work that is done once per image: the same blocks whatever the number of processes.

ImageBlock b holds the samples b * size … of the source's order, each once, through the evaluation transform (no augmentation). The last block
is filled up with its last sample, so that every block is computed in the same shapes; `num_real` says how many of a block are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.data.augment.execute import eval_transform
from dad_fast.data.loaders.workers import iterate
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.decode import DecodeError


class ImageBlock(NamedTuple):
    """Images are stored as NHWC behind an NCHW view; what cannot be read is black and not `readable`."""

    number: int
    num_real: int
    images: Tensor  # uint8 [S, 3, H, W]
    labels: Tensor  # int64 [S]
    samples: Tensor  # int64 [S], indices into the source
    readable: Tensor  # bool [S]
    unreadable: tuple[str, ...]  # files that fail although the index has them as sound

    def pin_memory(self) -> ImageBlock:
        return self._replace(
            **{
                name: value.pin_memory()
                for name, value in self._asdict().items()
                if isinstance(value, Tensor)
            }
        )


def num_blocks(source: Source, size: int) -> int:
    return -(-len(source) // size)


class _Blocks(Dataset[ImageBlock]):
    """Block number -> ImageBlock."""

    def __init__(
        self, source: Source, size: int, img_size: int, crop_pct: float, interpolation: str
    ) -> None:
        self.source, self.size = source, size
        self.transform = (img_size, crop_pct, interpolation)

    def __getitem__(self, number: int) -> ImageBlock:
        source, side = self.source, self.transform[0]
        first = number * self.size
        samples = np.minimum(np.arange(first, first + self.size), len(source) - 1)
        num_real = min(self.size, len(source) - first)
        images = torch.zeros(self.size, side, side, 3, dtype=torch.uint8)
        view, readable, unreadable = images.numpy(), source.ok[samples].copy(), []
        for row in range(num_real):
            if readable[row]:
                try:
                    view[row] = eval_transform(source.read(int(samples[row])), *self.transform)
                except DecodeError:
                    readable[row] = False
                    unreadable.append(source.keys[int(samples[row])])
        view[num_real:], readable[num_real:] = view[num_real - 1], readable[num_real - 1]
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
    img_size: int,
    crop_pct: float,
    interpolation: str,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[ImageBlock]:
    """The blocks `numbers`, in that order, made by `workers` processes (0: here)."""
    return iterate(
        _Blocks(source, size, img_size, crop_pct, interpolation), numbers, workers, pin_memory
    )
