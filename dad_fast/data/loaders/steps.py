"""Content of each step of a run: samples, labels, seeds, mixes, and the images as PIL makes them.

Step s of a run belongs to epoch s // steps_per_epoch; within an epoch the order of samples is a
keyed permutation. A step takes batch_size * world consecutive positions of that order, and each
rank a contiguous part of them. The tail is dropped, so every rank has the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import execute
from dad_fast.data.augment.records import (
    UNMIXED,
    AugmentRecord,
    mix_record,
    sample_record,
    uses_mixing,
)
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.decode import DecodeError
from dad_fast.errors import DataError
from dad_fast.keyed_random import ORDER, raw_bits, sample_seeds


@dataclass(frozen=True)
class Batch:
    """One training batch of a rank.

    Images are stored as NHWC behind an NCHW view (channels_last strides).
    """

    images: Tensor  # uint8 [B, 3, H, W]
    labels: Tensor  # int64 [B]
    samples: Tensor  # int64 [B], indices into the source
    seeds: Tensor  # int64 [B], keyed by (seed, epoch, sample), for noise drawn on the device
    # int64 [B]: 0 none, 1 mixup, 2 CutMix; partners are neighbours (0-1, 2-3, ...).
    mix_kind: Tensor
    mix_lam: Tensor  # float32 [B]: share of the own image
    mix_box: Tensor  # int64 [B, 4]: y0, y1, x0, x1
    epoch: int
    step: int  # of the whole run
    replaced: tuple[str, ...]  # unreadable files that another sample replaced
    # int64 [B], samples of the epoch order; they differ from `samples` where a file is unreadable.
    drawn: Tensor | None = None
    # From stores: Q(x') as pixels or codes, the teacher's logits on it, whether it counts, and the
    # teacher's logits on the mixed clean images.
    dad_images: Tensor | None = None  # uint8 [B, 3, H, W]
    dad_codes: Tensor | None = None  # uint8 [B, bytes], packed
    dad_outputs: Tensor | None = None  # float16 [B, C]
    dad_kept: Tensor | None = None  # float32 [B]
    clean_outputs: Tensor | None = None  # float16 [B, C]
    # For a linear probe: the teacher's predictions on the weak views, and with fixed views the
    # features of the strong ones.
    pseudo_labels: Tensor | None = None  # int64 [B]
    confidence: Tensor | None = None  # float32 [B]
    features: Tensor | None = None  # float32 [B, F]

    def _map(self, function: Any) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def split(self, num_parts: int) -> list[Batch]:
        """Return micro-batches of equal size; views."""
        if num_parts == 1:
            return [self]
        return [self._map(lambda tensor, i=i: tensor.chunk(num_parts)[i]) for i in range(num_parts)]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return the global order of an epoch: a permutation, int64 [num_samples].

    It is the same on every rank and for every batch size.
    """
    order = raw_bits(seed, ORDER, epoch, 0, num_samples).argsort(kind="stable")
    order.setflags(write=False)
    return order


class TrainSteps(Dataset[Batch]):
    """Step number -> Batch, executed with PIL. Other loaders take a step's content from here."""

    def __init__(
        self,
        source: Source,
        aug: AugmentConfig,
        img_size: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        cycle: int = 0,
    ) -> None:
        """cycle: epochs after which order, augmentation and mixes repeat; 0 = never."""
        self.source = source
        self.aug = aug
        self.img_size = img_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.cycle = cycle
        self.steps_per_epoch = len(source) // (batch_size * world)

    def __getitem__(self, step: int) -> Batch:
        images, fields = self._made(lambda load: self.fields(step, load))
        return Batch(images=images, **fields)

    def made(self, view: int, start: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the images of `place`, uint8 [B, 3, H, W], and its fields."""
        return self._made(lambda load: self.place(view, start, load))

    def _made(
        self, fields: Callable[[Callable[[int, AugmentRecord], None]], dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Any]]:
        side = self.img_size
        images = torch.empty(self.batch_size, side, side, 3, dtype=torch.uint8)
        view = images.numpy()

        def load(row: int, record: AugmentRecord) -> None:
            view[row] = execute(record, self.image(record.sample))

        found = fields(load)
        return images.permute(0, 3, 1, 2), found

    def fields(self, step: int, load: Callable[[int, AugmentRecord], None]) -> dict[str, Any]:
        """Return all fields of a Batch except its images, which `load(row, record)` makes.

        When `load` raises DecodeError, the next valid sample in the source's order takes the row,
        as if it had been drawn.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = (step_in_epoch * self.world + self.rank) * self.batch_size
        view = epoch % self.cycle if self.cycle else epoch
        found = self.place(view, start, load)
        seeds = torch.from_numpy(sample_seeds(self.seed, epoch, found["samples"].numpy()))
        return {**found, "seeds": seeds, "epoch": epoch, "step": step}

    def place(
        self, view: int, start: int, load: Callable[[int, AugmentRecord], None]
    ) -> dict[str, Any]:
        """Return the fields that do not depend on the run.

        They cover `batch_size` positions from `start` on in the order of epoch `view`. Past the end
        the last sample repeats; a sample without a partner is not mixed.
        """
        size, num = self.batch_size, len(self.source)
        positions = np.minimum(np.arange(start, start + size), num - 1)
        drawn = epoch_order(self.seed, view, num)[positions]
        samples = drawn.copy()
        replaced: list[str] = []
        for row in range(size):
            samples[row] = self._load(int(samples[row]), view, replaced, partial(load, row))

        mixes = [UNMIXED] * size
        if uses_mixing(self.aug):
            for first in range(0, size - 1, 2):
                if start + first + 1 < num:
                    pair = (start + first) // 2
                    mix = mix_record(self.aug, self.img_size, self.seed, view, pair)
                    mixes[first : first + 2] = [mix, mix]
        return {
            "labels": torch.from_numpy(self.source.labels[samples]),
            "samples": torch.from_numpy(samples),
            "drawn": torch.from_numpy(drawn),
            "mix_kind": torch.tensor([m.kind for m in mixes]),
            "mix_lam": torch.tensor([m.lam for m in mixes], dtype=torch.float32),
            "mix_box": torch.tensor([m.box for m in mixes]),
            "replaced": tuple(replaced),
        }

    def _load(
        self, sample: int, epoch: int, replaced: list[str], load: Callable[[AugmentRecord], None]
    ) -> int:
        source = self.source
        for _ in range(len(source)):
            if source.ok[sample]:
                width, height = (int(x) for x in source.sizes[sample])
                record = sample_record(
                    self.aug, self.img_size, self.seed, epoch, sample, width, height
                )
                try:
                    load(record)
                    return sample
                except DecodeError:
                    pass
            replaced.append(source.keys[sample])
            sample = (sample + 1) % len(source)
        raise DataError(f"{source.name}: not one image can be read (--data-dir)")

    def image(self, sample: int) -> Image.Image:
        """Read a sample. Raises DecodeError when that fails or its size is not the index's."""
        image = self.source.read(sample)
        width, height = (int(x) for x in self.source.sizes[sample])
        if image.size != (width, height):
            raise DecodeError(
                f"{self.source.keys[sample]}: {image.size[0]}x{image.size[1]} pixels, "
                f"{width}x{height} in the index"
            )
        return image
