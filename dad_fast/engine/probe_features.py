"""Features of strong views that do not change: the encoder runs once per view, and training is on features alone.

Views are fixed where nothing of the augmentation is random, or where `lp_clip.views` says how many are drawn once: view v is that of
epoch v in a run without kept features, and serves the epochs e = v mod views. The order of the samples is new in every epoch. Several
processes share the work, and each keeps the whole table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import execute
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.augment.records import sample_record
from dad_fast.data.loaders.loader import EvalBatch
from dad_fast.data.loaders.steps import Batch, TrainSteps, epoch_order
from dad_fast.data.loaders.workers import iterate
from dad_fast.data.sources.base import Source
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.pseudo_labels import Lines, share
from dad_fast.errors import UsageError


class _ViewBatches(Dataset[EvalBatch]):
    """(view, batch number) as one number -> the strong views of consecutive readable samples."""

    def __init__(self, steps: TrainSteps, samples: np.ndarray, batch_size: int) -> None:
        self.steps, self.samples, self.batch_size = steps, samples, batch_size
        self.per_view = -(-len(samples) // batch_size)

    def __getitem__(self, number: int) -> EvalBatch:
        view, number = divmod(number, self.per_view)
        samples = self.samples[number * self.batch_size : (number + 1) * self.batch_size]
        steps, side = self.steps, self.steps.img_size
        images = torch.empty(len(samples), side, side, 3, dtype=torch.uint8)
        for row, sample in enumerate(samples.tolist()):
            width, height = (int(x) for x in steps.source.sizes[sample])
            record = sample_record(steps.aug, side, steps.seed, view, sample, width, height)
            images.numpy()[row] = execute(record, steps.image(sample))
        return EvalBatch(
            images.permute(0, 3, 1, 2),
            torch.from_numpy(steps.source.labels[samples]),
            torch.from_numpy(samples.copy()),
        )


class FeatureTable:
    """Features float32 [views, N, F] in host memory, made by `prepare`. Rows of unreadable images are never asked for.

    encode: pixels float32 [B, 3, H, W] in [0, 1] on `device` -> features [B, F]. Images are decoded by PIL.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        num_features: int,
        source: Source,
        aug: AugmentConfig,
        img_size: int,
        seed: int,
        views: int,
        batch_size: int,
        workers: int,
        device: torch.device,
    ) -> None:
        """Raises UsageError where the table would not fit into the machine's memory."""
        self.encode, self.source, self.aug, self.img_size, self.seed, self.views = (
            encode,
            source,
            aug,
            img_size,
            seed,
            views,
        )
        self.batch_size, self.workers, self.device = batch_size, workers, device
        self.shape = (views, len(source), num_features)
        self.features: Tensor | None = None
        needed, there = 4 * views * len(source) * num_features, _memory()
        if needed > 0.8 * there:
            sizes = f"{needed / 2**30:.0f} GiB of features and {there / 2**30:.0f} GiB of memory"
            raise UsageError(
                f"--lp-views {views}: {sizes}; keep fewer views, or 0 to run the encoder in every step"
            )

    @torch.no_grad()
    def prepare(self, say: Callable[[str], None]) -> None:
        if self.features is None:
            steps = TrainSteps(
                self.source, self.aug, self.img_size, self.batch_size, self.seed, rank=0, world=1
            )
            batches = _ViewBatches(
                steps, share(np.flatnonzero(self.source.ok), self.batch_size), self.batch_size
            )
            features = torch.zeros(self.shape)
            done, tell = 0, Lines(say, "features", self.views * len(batches.samples))
            numbers = range(self.views * batches.per_view)
            pin = self.device.type == "cuda"
            for number, batch in zip(
                numbers, iterate(batches, numbers, self.workers, pin), strict=True
            ):
                found = self.encode(to_pixels(batch.images.to(self.device, non_blocking=True)))
                features[number // batches.per_view, batch.samples] = found.float().cpu()
                done += len(batch.samples)
                tell(done)
            self.features = distributed.all_reduce_sums(features)
        views, num, width = self.shape
        what = (
            "one view, which is the same in every epoch"
            if views == 1
            else f"{views} views drawn once"
        )
        say(
            f"features are kept: {what}, {num:,} x {width} each ({4 * views * num * width / 2**20:,.0f} MiB); training is on them alone"
        )


class FeatureLoader:
    """Batches of kept features, of one rank, from any step on; it stands where `TrainLoader` does. `images` are empty."""

    name = "features"
    failed_over = 0

    def __init__(
        self,
        table: FeatureTable,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> None:
        steps = TrainSteps(table.source, table.aug, table.img_size, batch_size, seed, rank, world)
        self.source, self.steps_per_epoch, self.pin_memory = (
            table.source,
            steps.steps_per_epoch,
            pin_memory,
        )
        if batch_size < 1 or self.steps_per_epoch == 0:
            has = f"{self.source.name} has only {len(self.source):,} images"
            raise UsageError(f"--batch-size {batch_size}: {has} for {world} x {batch_size}")
        self.table, self.batch_size, self.seed, self.rank, self.world = (
            table,
            batch_size,
            seed,
            rank,
            world,
        )
        self.replaced = [
            self.source.keys[int(sample)] for sample in np.flatnonzero(~self.source.ok)
        ]
        readable = np.flatnonzero(self.source.ok)
        after = np.searchsorted(readable, np.arange(len(self.source))) % len(readable)
        self._valid = readable[after]  # the next readable sample, in the source's order, for each

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        for step in range(start_step, stop_step):
            batch = self._batch(step)
            yield batch.pin_memory() if self.pin_memory else batch

    def _batch(self, step: int) -> Batch:
        assert self.table.features is not None, "prepare() first"
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start, size, num = (
            (step_in_epoch * self.world + self.rank) * self.batch_size,
            self.batch_size,
            len(self.source),
        )
        drawn = epoch_order(self.seed, epoch, num)[
            np.minimum(np.arange(start, start + size), num - 1)
        ]
        samples = torch.from_numpy(self._valid[drawn])
        return Batch(
            images=torch.empty(size, 0, dtype=torch.uint8),
            labels=torch.from_numpy(self.source.labels[samples.numpy()]),
            samples=samples,
            seeds=torch.zeros(size, dtype=torch.int64),
            mix_kind=torch.zeros(size, dtype=torch.int64),
            mix_lam=torch.ones(size),
            mix_box=torch.zeros(size, 4, dtype=torch.int64),
            epoch=epoch,
            step=step,
            replaced=(),
            drawn=torch.from_numpy(drawn.copy()),
            features=self.table.features[epoch % self.table.views, samples],
        )


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
