"""Features of fixed strong views: the encoder runs once per view, and training uses the features
alone.

Views are fixed if the augmentation has nothing random, or if `lp_clip.views` draws some once: view
v is that of epoch v in a run without kept features, and serves the epochs e = v mod views. The
order of the samples is new in every epoch. Processes share the work, and each keeps the whole
table.
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
from dad_fast.engine.probe.pseudo_labels import Lines, share
from dad_fast.errors import UsageError


class _ViewBatches(Dataset[EvalBatch]):
    """Strong views of consecutive readable samples; index = view * batches per view + batch."""

    def __init__(self, steps: TrainSteps, samples: np.ndarray, batch_size: int) -> None:
        self.steps = steps
        self.samples = samples
        self.batch_size = batch_size
        self.per_view = -(-len(samples) // batch_size)

    def __getitem__(self, number: int) -> EvalBatch:
        view, number = divmod(number, self.per_view)
        start = number * self.batch_size
        samples = self.samples[start : start + self.batch_size]
        steps = self.steps
        side = steps.img_size
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
    """Features float32 [views, N, F] in host memory; `prepare` makes them. Rows of unreadable
    images stay zero.
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
        """Create an empty table.

        encode: pixels float32 [B, 3, H, W] in [0, 1] on `device` -> features [B, F]. PIL decodes
        the images.
        Raises UsageError if the table would not fit into the machine's memory.
        """
        self.encode = encode
        self.source = source
        self.aug = aug
        self.img_size = img_size
        self.seed = seed
        self.views = views
        self.batch_size = batch_size
        self.workers = workers
        self.device = device
        self.shape = (views, len(source), num_features)
        self.features: Tensor | None = None
        needed = 4 * views * len(source) * num_features
        available = _memory()
        if needed > 0.8 * available:
            sizes = (
                f"{needed / 2**30:.0f} GiB of features and {available / 2**30:.0f} GiB of memory"
            )
            raise UsageError(
                f"--lp-views {views}: {sizes}; keep fewer views, or 0 to run the encoder in every "
                "step"
            )

    @torch.no_grad()
    def prepare(self, log: Callable[[str], None]) -> None:
        """Make the features unless they are there. A collective; `log` gets lines of text."""
        if self.features is None:
            self.features = self._made(log)
        views, num, width = self.shape
        kept = f"{views} views drawn once" if views > 1 else "one view, the same in every epoch"
        mebibytes = 4 * views * num * width / 2**20
        log(
            f"features are kept: {kept}, {num:,} x {width} each ({mebibytes:,.0f} MiB); "
            "training uses them alone"
        )

    def _made(self, log: Callable[[str], None]) -> Tensor:
        steps = TrainSteps(
            self.source, self.aug, self.img_size, self.batch_size, self.seed, rank=0, world=1
        )
        mine = share(np.flatnonzero(self.source.ok), self.batch_size)
        batches = _ViewBatches(steps, mine, self.batch_size)
        numbers = range(self.views * batches.per_view)
        loaded = iterate(batches, numbers, self.workers, self.device.type == "cuda")

        features = torch.zeros(self.shape)
        progress = Lines(log, "features", self.views * len(mine))
        done = 0
        for number, batch in zip(numbers, loaded, strict=True):
            found = self.encode(to_pixels(batch.images.to(self.device, non_blocking=True)))
            features[number // batches.per_view, batch.samples] = found.float().cpu()
            done += len(batch.samples)
            progress(done)
        return distributed.all_reduce_sums(features)


class FeatureLoader:
    """Loader of kept features for one rank, with the interface of `TrainLoader`.

    The `images` of its batches are empty.
    """

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
        """Create a loader.

        Raises UsageError if the data has fewer images than a batch of all ranks.
        """
        steps = TrainSteps(table.source, table.aug, table.img_size, batch_size, seed, rank, world)
        self.table = table
        self.source = table.source
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pin_memory = pin_memory
        self.steps_per_epoch = steps.steps_per_epoch
        if batch_size < 1 or self.steps_per_epoch == 0:
            has = f"{self.source.name} has only {len(self.source):,} images"
            raise UsageError(f"--batch-size {batch_size}: {has} for {world} x {batch_size}")

        unreadable = np.flatnonzero(~self.source.ok)
        self.replaced = [self.source.keys[int(sample)] for sample in unreadable]
        # For each sample, the next readable one in the source's order.
        readable = np.flatnonzero(self.source.ok)
        after = np.searchsorted(readable, np.arange(len(self.source))) % len(readable)
        self._valid = readable[after]

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yield the batches of steps `start_step` to `stop_step` - 1."""
        for step in range(start_step, stop_step):
            batch = self._batch(step)
            yield batch.pin_memory() if self.pin_memory else batch

    def _batch(self, step: int) -> Batch:
        assert self.table.features is not None, "prepare() first"
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        size, num = self.batch_size, len(self.source)
        start = (step_in_epoch * self.world + self.rank) * size
        places = np.minimum(np.arange(start, start + size), num - 1)
        drawn = epoch_order(self.seed, epoch, num)[places]
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
    """Return the size of the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
