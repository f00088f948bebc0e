"""Training and evaluation loaders on PIL, with worker processes.

Loaders are stateless apart from the step number, so a resumed run gets exactly the batches of an
uninterrupted one (see steps.py). One set of workers serves the whole run.
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
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.steps import Batch, TrainSteps
from dad_fast.data.loaders.workers import iterate, loader_processes
from dad_fast.data.sources.base import Source
from dad_fast.errors import DataError, UsageError

log = logging.getLogger("dad_fast.data")

# Unreadable images that get a log line each; half a percent of a million would fill the terminal.
NAMED = 10


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
        pin_memory: put the batches into page-locked memory, for asynchronous copies to a GPU.
        cycle: epochs after which order, augmentation and mixes repeat, as stored teacher outputs
            need; 0 = never.

    `replaced` names the unreadable files so far. Raises DataError when their share exceeds the
    source's `max_bad_share`.
    """

    name = "pil"
    # Reason for the choice of this loader, of `train_loader`.
    why = "asked for"
    # Batches that PIL made because the loader's own decoder failed.
    failed_over = 0

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
                f"--batch-size {batch_size}: must be even with --mixup or --cutmix, "
                "which mix images in pairs"
            )
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size}: must be at least 1")
        self._steps = TrainSteps(source, aug, img_size, batch_size, seed, rank, world, cycle)
        self.steps_per_epoch = self._steps.steps_per_epoch
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"--batch-size {batch_size}: {source.name} has only {len(source):,} images for a "
                f"step of {world} x {batch_size}; write --batch-size auto, or "
                f"{max(1, len(source) // world)} or less"
            )
        self.source = source
        self.workers = loader_processes(workers)
        self.pin_memory = pin_memory
        # Distinct names, in the order of their failure.
        self.replaced: list[str] = []

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yield the batches of the run's steps start_step … stop_step - 1, across epochs."""
        steps = range(start_step, stop_step)
        for batch in iterate(self._steps, steps, self.workers, self.pin_memory):
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
                "%s: more images cannot be read; they are replaced and counted without a line each",
                self.source.name,
            )
        if len(self.replaced) > self.source.max_bad_share * len(self.source):
            raise DataError(
                f"{self.source.name}: {len(self.replaced):,} of {len(self.source):,} images cannot "
                f"be read, such as {self.replaced[0]}; "
                "fix or remove them, or raise data.max_bad_share"
            )


class _EvalBatches(Dataset[EvalBatch]):
    """Batch number -> EvalBatch."""

    def __init__(
        self,
        source: Source,
        view: View,
        batch_size: int,
    ) -> None:
        self.source = source
        self.view = view
        self.batch_size = batch_size
        self.samples = np.flatnonzero(source.ok)

    def __getitem__(self, number: int) -> EvalBatch:
        return self.made(number, lambda row, sample: False)

    def made(self, number: int, skip: Callable[[int, int], bool]) -> EvalBatch:
        """Make the batch; rows for which `skip(row, sample)` is true are left for the caller."""
        samples = self.samples[number * self.batch_size : (number + 1) * self.batch_size]
        side = self.view.image_size
        images = torch.empty(len(samples), side, side, 3, dtype=torch.uint8)
        rows = images.numpy()
        for row, sample in enumerate(samples):
            if not skip(row, int(sample)):
                rows[row] = eval_transform(self.source.read(int(sample)), *self.view)
        return EvalBatch(
            images.permute(0, 3, 1, 2),
            torch.from_numpy(self.source.labels[samples]),
            torch.from_numpy(samples.copy()),
        )


class EvalLoader:
    """Every readable image of a source once, in its order; the last batch may be smaller.

    `skipped` counts the files that the index found unreadable. A file that fails after indexing
    raises DecodeError, so that a metric always covers the number of images that it reports.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        batch_size: int,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._batches = _EvalBatches(source, view, batch_size)
        self.workers = loader_processes(workers)
        self.pin_memory = pin_memory
        self.num_images = len(self._batches.samples)
        self.skipped = len(source) - self.num_images

    def __len__(self) -> int:
        return -(-self.num_images // self._batches.batch_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        return iterate(self._batches, range(len(self)), self.workers, self.pin_memory)
