"""Loaders: they execute records, in processes of their own, and know no state but the step.

One set of workers serves the whole run, and starting at any step is the same as having come there (steps.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import eval_transform
from dad_fast.data.augment.records import uses_mixing
from dad_fast.data.loaders.steps import Batch, TrainSteps
from dad_fast.data.loaders.workers import iterate
from dad_fast.data.sources.base import Source
from dad_fast.errors import DataError, UsageError

log = logging.getLogger("dad_fast.data")

NAMED = 10  # unreadable images with a line each; a million images with half a percent of them would fill the terminal


class EvalBatch(NamedTuple):
    images: Tensor  # uint8 [B, 3, H, W]
    labels: Tensor  # int64 [B]
    samples: Tensor  # int64 [B]

    def pin_memory(self) -> EvalBatch:
        return EvalBatch(*(tensor.pin_memory() for tensor in self))


class TrainLoader:
    """Training batches of one rank, from any step on.

    Args:
        batch_size: clean images per step on this rank; even when images are mixed.
        workers: processes; 0 loads in this one.
        pin_memory: put the batches into page-locked memory, for copies to a GPU that do not wait.
        cycle: epochs after which order, augmentation and mixes come again, as stored teacher outputs need it; 0 = never.

    `replaced` names the unreadable files that were met so far; more of them than the source's `max_bad_share` raise DataError.
    """

    name = "pil"
    failed_over = 0  # batches that PIL made because the loader's own decoder failed

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
        cycle: int = 0,
    ) -> None:
        if uses_mixing(aug) and batch_size % 2:
            raise UsageError(
                f"--batch-size {batch_size}: must be even with --mixup or --cutmix, which mix images in pairs"
            )
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size}: must be at least 1")
        self._steps = TrainSteps(source, aug, img_size, batch_size, seed, rank, world, cycle)
        self.steps_per_epoch = self._steps.steps_per_epoch
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"--batch-size {batch_size}: {source.name} has only {len(source):,} images for {world} x {batch_size}"
            )
        self.source, self.workers, self.pin_memory = source, workers, pin_memory
        self.replaced: list[str] = []  # distinct, in the order in which they turned up

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of the steps start_step … stop_step - 1 of the run, across epochs, from one set of workers."""
        for batch in iterate(
            self._steps, range(start_step, stop_step), self.workers, self.pin_memory
        ):
            for name in batch.replaced:
                self._note(name)
            yield batch

    def _note(self, name: str) -> None:
        if name in self.replaced:
            return
        self.replaced.append(name)
        if len(self.replaced) <= NAMED:
            log.warning(
                "%s: %s cannot be read; the next valid image takes its place",
                self.source.name,
                name,
            )
        elif len(self.replaced) == NAMED + 1:
            log.warning(
                "%s: more images cannot be read; they are replaced too, and counted without a line each",
                self.source.name,
            )
        if len(self.replaced) > self.source.max_bad_share * len(self.source):
            raise DataError(
                f"{self.source.name}: {len(self.replaced):,} of {len(self.source):,} images cannot be read, such as {self.replaced[0]}; "
                "mend or remove them, or raise data.max_bad_share"
            )


class _EvalBatches(Dataset[EvalBatch]):
    """Batch number -> EvalBatch."""

    def __init__(
        self, source: Source, img_size: int, crop_pct: float, interpolation: str, batch_size: int
    ) -> None:
        self.source, self.img_size, self.crop_pct, self.interpolation = (
            source,
            img_size,
            crop_pct,
            interpolation,
        )
        self.batch_size = batch_size
        self.samples = np.flatnonzero(source.ok)

    def __getitem__(self, number: int) -> EvalBatch:
        return self.made(number, lambda row, sample: False)

    def made(self, number: int, skip: Callable[[int, int], bool]) -> EvalBatch:
        """The batch, without the images that `skip(row, sample)` says somebody else makes."""
        samples = self.samples[number * self.batch_size : (number + 1) * self.batch_size]
        images = torch.empty(len(samples), self.img_size, self.img_size, 3, dtype=torch.uint8)
        view = images.numpy()
        for row, sample in enumerate(samples):
            if not skip(row, int(sample)):
                view[row] = eval_transform(
                    self.source.read(int(sample)), self.img_size, self.crop_pct, self.interpolation
                )
        return EvalBatch(
            images.permute(0, 3, 1, 2),
            torch.from_numpy(self.source.labels[samples]),
            torch.from_numpy(samples.copy()),
        )


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
