"""Loaders: they execute records, in processes of their own, and know no state but the step.

Step s of a run belongs to epoch s // steps_per_epoch; within it the order of samples is a keyed permutation. A step takes
batch_size * world consecutive positions of that order, a rank its own stretch of them; the tail is dropped, so every rank has the same
number of steps. One set of workers serves the whole run, and starting at any step is the same as having come there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.decode import DecodeError
from dad_fast.data.draws import ORDER, raw_bits, sample_seeds
from dad_fast.data.execute import eval_transform, execute
from dad_fast.data.records import UNMIXED, mix_record, sample_record, uses_mixing
from dad_fast.data.sources import Source
from dad_fast.data.workers import iterate
from dad_fast.errors import DataError, UsageError

log = logging.getLogger("dad_fast.data")


@dataclass(frozen=True)
class Batch:
    """One training batch of a rank. Images are stored as NHWC behind an NCHW view (channels_last strides)."""

    images: Tensor  # uint8 [B, 3, H, W]
    labels: Tensor  # int64 [B]
    samples: Tensor  # int64 [B], indices into the source
    seeds: Tensor  # int64 [B], keyed by (seed, epoch, sample): for noise drawn on the device
    mix_kind: Tensor  # int64 [B]: 0 none, 1 mixup, 2 CutMix; partners are neighbours (0-1, 2-3, ...)
    mix_lam: Tensor  # float32 [B]: share of the own image
    mix_box: Tensor  # int64 [B, 4]: y0, y1, x0, x1
    epoch: int
    step: int  # of the whole run
    replaced: tuple[str, ...]  # unreadable files whose place another sample took

    def _map(self, function: Any) -> Batch:
        return replace(self, **{name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def split(self, num_parts: int) -> list[Batch]:
        """Micro-batches of equal size; views."""
        return [self._map(lambda tensor, i=i: tensor.chunk(num_parts)[i]) for i in range(num_parts)] if num_parts > 1 else [self]


class EvalBatch(NamedTuple):
    images: Tensor  # uint8 [B, 3, H, W]
    labels: Tensor  # int64 [B]
    samples: Tensor  # int64 [B]

    def pin_memory(self) -> EvalBatch:
        return EvalBatch(*(tensor.pin_memory() for tensor in self))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The global order of an epoch: a permutation, int64 [num_samples], the same on every rank and for every batch size."""
    order = raw_bits(seed, ORDER, epoch, 0, num_samples).argsort(kind="stable")
    order.setflags(write=False)
    return order


class _TrainBatches(Dataset[Batch]):
    """Step number -> Batch."""

    def __init__(self, source: Source, aug: AugmentConfig, img_size: int, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.source, self.aug, self.img_size, self.batch_size = source, aug, img_size, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.steps_per_epoch = len(source) // (batch_size * world)

    def __getitem__(self, step: int) -> Batch:
        size, side = self.batch_size, self.img_size
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = (step_in_epoch * self.world + self.rank) * size
        samples = epoch_order(self.seed, epoch, len(self.source))[start : start + size].copy()
        images = torch.empty(size, side, side, 3, dtype=torch.uint8)
        view = images.numpy()
        replaced: list[str] = []
        for row in range(size):
            samples[row], view[row] = self._load(int(samples[row]), epoch, replaced)
        mixes = [UNMIXED] * size
        if uses_mixing(self.aug):
            pairs = [mix_record(self.aug, side, self.seed, epoch, start // 2 + i) for i in range(size // 2)]
            mixes = [pair for pair in pairs for _ in range(2)]
        return Batch(
            images=images.permute(0, 3, 1, 2),
            labels=torch.from_numpy(self.source.labels[samples]),
            samples=torch.from_numpy(samples),
            seeds=torch.from_numpy(sample_seeds(self.seed, epoch, samples)),
            mix_kind=torch.tensor([m.kind for m in mixes]),
            mix_lam=torch.tensor([m.lam for m in mixes], dtype=torch.float32),
            mix_box=torch.tensor([m.box for m in mixes]),
            epoch=epoch,
            step=step,
            replaced=tuple(replaced),
        )

    def _load(self, sample: int, epoch: int, replaced: list[str]) -> tuple[int, np.ndarray]:
        """Read and augment a sample, or the next valid one after it in the source's order, as if that one had been drawn."""
        source = self.source
        for _ in range(len(source)):
            if source.ok[sample]:
                try:
                    return sample, self._augment(source, sample, epoch)
                except DecodeError:
                    pass
            replaced.append(source.keys[sample])
            sample = (sample + 1) % len(source)
        raise DataError(f"{source.name}: not one image can be read (--data-dir)")

    def _augment(self, source: Source, sample: int, epoch: int) -> np.ndarray:
        image = source.read(sample)
        width, height = (int(x) for x in source.sizes[sample])
        if image.size != (width, height):
            raise DecodeError(f"{source.keys[sample]}: {image.size[0]}x{image.size[1]} where the index says {width}x{height}")
        return execute(sample_record(self.aug, self.img_size, self.seed, epoch, sample, width, height), image)


class TrainLoader:
    """Training batches of one rank, from any step on.

    Args:
        batch_size: clean images per step on this rank; even when images are mixed.
        workers: processes; 0 loads in this one.
        pin_memory: put the batches into page-locked memory, for copies to a GPU that do not wait.

    `replaced` names the unreadable files that were met so far; more of them than the source's `max_bad_share` raise DataError.
    """

    name = "torchvision"

    def __init__(
        self,
        source: Source,
        aug: AugmentConfig,
        img_size: int,
        batch_size: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if uses_mixing(aug) and batch_size % 2:
            raise UsageError(f"--batch-size {batch_size}: must be even with --mixup or --cutmix, which mix images in pairs")
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size}: must be at least 1")
        self._batches = _TrainBatches(source, aug, img_size, batch_size, seed, rank, world)
        self.steps_per_epoch = self._batches.steps_per_epoch
        if self.steps_per_epoch == 0:
            raise UsageError(f"--batch-size {batch_size}: {source.name} has only {len(source):,} images for {world} x {batch_size}")
        self.source, self.workers, self.pin_memory = source, workers, pin_memory
        self.replaced: list[str] = []  # distinct, in the order in which they turned up

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of the steps start_step … stop_step - 1 of the run, across epochs, from one set of workers."""
        for batch in iterate(self._batches, range(start_step, stop_step), self.workers, self.pin_memory):
            for name in batch.replaced:
                self._note(name)
            yield batch

    def _note(self, name: str) -> None:
        if name in self.replaced:
            return
        self.replaced.append(name)
        log.warning("%s: %s cannot be read; the next valid image takes its place", self.source.name, name)
        if len(self.replaced) > self.source.max_bad_share * len(self.source):
            raise DataError(
                f"{self.source.name}: {len(self.replaced):,} of {len(self.source):,} images cannot be read, such as {self.replaced[0]}; "
                "mend or remove them, or raise data.max_bad_share"
            )


class _EvalBatches(Dataset[EvalBatch]):
    """Batch number -> EvalBatch."""

    def __init__(self, source: Source, img_size: int, crop_pct: float, interpolation: str, batch_size: int) -> None:
        self.source, self.img_size, self.crop_pct, self.interpolation = source, img_size, crop_pct, interpolation
        self.batch_size = batch_size
        self.samples = np.flatnonzero(source.ok)

    def __getitem__(self, number: int) -> EvalBatch:
        samples = self.samples[number * self.batch_size : (number + 1) * self.batch_size]
        images = torch.empty(len(samples), self.img_size, self.img_size, 3, dtype=torch.uint8)
        view = images.numpy()
        for row, sample in enumerate(samples):
            view[row] = eval_transform(self.source.read(int(sample)), self.img_size, self.crop_pct, self.interpolation)
        return EvalBatch(images.permute(0, 3, 1, 2), torch.from_numpy(self.source.labels[samples]), torch.from_numpy(samples.copy()))


class EvalLoader:
    """Every readable image of a source once, in its order; the last batch may be smaller.

    `skipped` counts the files that the index found unreadable. A file that fails since raises DecodeError: a judged number is
    never taken over other images than it says.
    """

    def __init__(
        self,
        source: Source,
        img_size: int,
        crop_pct: float,
        interpolation: str,
        batch_size: int,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._batches = _EvalBatches(source, img_size, crop_pct, interpolation, batch_size)
        self.workers, self.pin_memory = workers, pin_memory
        self.num_images = len(self._batches.samples)
        self.skipped = len(source) - self.num_images

    def __len__(self) -> int:
        return -(-self.num_images // self._batches.batch_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        return iterate(self._batches, range(len(self)), self.workers, self.pin_memory)
