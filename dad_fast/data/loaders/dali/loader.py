"""Training loader on DALI: worker processes plan, the pipeline (pipeline.py) decodes and augments.

A worker turns a step into the files' bytes and the numbers of their records; the training process
feeds them to DALI, two batches ahead of the one that it returns. The sequence of samples, labels,
seeds and mixes is that of the PIL loader; the loader is stateless apart from the step.

PIL makes images that DALI does not decode as PIL does (anything but plain JPEGs) in the worker, one
by one. PIL makes a batch as a whole when DALI fails on it, always: a batch's pixels depend on its
files alone, not on earlier failures.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dad_fast.data.augment.policies import most_operations
from dad_fast.data.loaders.dali.pipeline import FILTER_TYPES, augment
from dad_fast.data.loaders.dali.plan import (
    FILTERS,
    Planned,
    PlannedSteps,
    split_patches,
)
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.loaders.steps import Batch, TrainSteps
from dad_fast.data.loaders.workers import iterate
from dad_fast.errors import EnvironmentProblem

log = logging.getLogger("dad_fast.data")

# Batches that DALI holds while the run trains on another.
_AHEAD = 2
# Batches in a row that PIL can make and DALI cannot, after which the files are not the cause.
_GIVE_UP = 8
# Python classes of DALI's own exceptions.
FAILURES = (RuntimeError, IndexError, ValueError)
_FILTER_CODES = np.array([int(FILTER_TYPES[name]) for name in FILTERS], np.int32)


def built(make: Callable[..., Any], **options: Any) -> Any:
    """Define a pipeline by `make(**options)` and build it.

    Raises EnvironmentProblem if that fails: a driver or a version that DALI cannot work with.
    """
    try:
        pipeline = make(**options)
        pipeline.build()
    # DALI has exceptions of many types.
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise EnvironmentProblem(
            f"--loader dali: DALI cannot build its pipeline here ({why}); use --loader pil"
        ) from error
    return pipeline


def raise_after_repeated_failures(failed_in_a_row: int, reason: str) -> None:
    """Raise EnvironmentProblem after _GIVE_UP batches in a row that only PIL could make."""
    if failed_in_a_row >= _GIVE_UP:
        raise EnvironmentProblem(
            f"DALI failed on {_GIVE_UP} batches in a row that PIL can read ({reason}); "
            "use --loader pil"
        )


class DaliLoader(TrainLoader):
    """Training batches of one rank, decoded and augmented by DALI.

    Samples and their order are those of `TrainLoader`.

    Args:
        device: of the returned images. On CUDA the decoder is the mixed one (not yet run on a GPU).

    Raises EnvironmentProblem where DALI cannot be built.

    On CUDA `Batch.images` lies on the device, bound to the stream that was current when the batch
    was requested: use it on that stream and keep a reference while work on it is queued. All other
    tensors of a batch are in host memory, pinned on request.

    `failed_over` counts the batches that PIL made because DALI failed on them.
    """

    name = "dali"

    def __init__(self, *args: Any, device: torch.device, **options: Any) -> None:
        super().__init__(*args, **options)
        self._plans = PlannedSteps(self._steps)
        self.device = device
        self.failed_over = 0
        self._failed_in_a_row = 0
        # For the first call of `batches`.
        self._built: _Engine | None = _Engine(self._steps, self.device, self.workers)

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        engine = self._built or _Engine(self._steps, self.device, self.workers)
        self._built = None
        waiting: deque[Planned] = deque()
        steps = range(start_step, stop_step)
        for planned in iterate(self._plans, steps, self.workers, self.pin_memory):
            engine.feed(planned)
            waiting.append(planned)
            if len(waiting) > _AHEAD:
                yield self._take(engine, waiting)
        while waiting:
            yield self._take(engine, waiting)

    def _take(self, engine: _Engine, waiting: deque[Planned]) -> Batch:
        planned = waiting.popleft()
        try:
            batch = engine.take(planned)
            self._failed_in_a_row = 0
        except FAILURES:
            # A later batch may have broken the pipeline, so this one is tried alone.
            batch = self._alone(engine, planned)
            for later in waiting:
                engine.feed(later)
        for name in batch.replaced:
            self._note(name)
        return batch

    def _alone(self, engine: _Engine, planned: Planned) -> Batch:
        engine.restart()
        try:
            engine.feed(planned)
            batch = engine.take(planned)
            self._failed_in_a_row = 0
            return batch
        except FAILURES as error:
            reason = self._reason(error, planned)
        engine.restart()
        batch = self._steps[planned.batch.step]
        self.failed_over += 1
        if set(batch.replaced) - set(planned.batch.replaced):
            # PIL cannot read the file either; the log names it as any unreadable file.
            return engine.place(batch.images, batch)
        self._failed_in_a_row += 1
        raise_after_repeated_failures(self._failed_in_a_row, reason)
        log.warning(
            "%s: DALI could not make the batch of step %d, PIL did (%s)",
            self.source.name,
            planned.batch.step,
            reason,
        )
        return engine.place(batch.images, batch)

    def _reason(self, error: Exception, planned: Planned) -> str:
        """Return the first line of DALI's error, with the file's name if DALI gives a number."""
        text = str(error).partition("encountered:")[2] or str(error)
        lines = [line.strip(" :") for line in text.splitlines() if line.strip()]
        reason = lines[0][:200] if lines else "no reason given"
        number = re.search(r"sample #(\d+)", reason)
        if number is None or int(number[1]) >= len(planned.rows):
            return reason
        row = planned.rows[int(number[1])]
        return f"{reason}: {self.source.keys[int(planned.batch.samples[row])]}"


class _Engine:
    """The pipeline with its inputs and outputs. An error of DALI (FAILURES) ends the pipeline."""

    def __init__(self, steps: TrainSteps, device: torch.device, threads: int) -> None:
        self.steps, self.device, self.threads = steps, device, max(1, threads)
        self.erases = steps.aug.reprob > 0
        self.restart()

    def restart(self) -> None:
        cuda = self.device.type == "cuda"
        index = self.device.index
        if cuda and index is None:
            index = torch.cuda.current_device()
        self.pipeline = built(
            augment,
            img_size=self.steps.img_size,
            num_ops=most_operations(self.steps.aug),
            erases=self.erases,
            device="mixed" if cuda else "cpu",
            hints=_mixed_hints(self.steps.source.sizes) if cuda else {},
            batch_size=self.steps.batch_size,
            num_threads=self.threads,
            device_id=index,
            # Runs that the first call starts; later ones queue up behind it all the same.
            prefetch_queue_depth=1,
        )
        self.broken: Exception | None = None

    def feed(self, planned: Planned) -> None:
        """Start DALI on a batch. The next `take` raises an error that occurs here."""
        if not len(planned.rows):
            return
        files = np.split(planned.files.numpy(), planned.ends[:-1].tolist())
        numbers: dict[str, Any] = dict(planned.numbers)
        numbers["filter"] = _FILTER_CODES[numbers["filter"]]
        boxes = numbers.pop("box")
        if self.erases:
            numbers |= {"box": boxes, "patch": split_patches(planned.patches.numpy(), boxes)}
        try:
            # Not copied: `planned` is kept until its batch is taken.
            self.pipeline.feed_input("files", files)
            for name, value in numbers.items():
                self.pipeline.feed_input(name, value)
            self.pipeline.schedule_run()
        except FAILURES as error:
            self.broken = error

    def take(self, planned: Planned) -> Batch:
        """Return the batch that was fed first of those not yet taken."""
        if not len(planned.rows):
            return self.place(planned.batch.images, planned.batch)
        if self.broken is not None:
            raise self.broken
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (found,) = self.pipeline.share_outputs(cuda_stream=stream)
        made = torch.from_dlpack(found.as_tensor())  # uint8 [n, S, S, 3], which owns its memory
        self.pipeline.release_outputs()
        images = made.permute(0, 3, 1, 2)
        if len(planned.rows) < len(planned.batch.labels):
            images = self._merge(images, planned)
        return self.place(images, planned.batch)

    def place(self, images: Tensor, batch: Batch) -> Batch:
        return replace(batch, images=images.to(self.device, non_blocking=True))

    def _merge(self, images: Tensor, planned: Planned) -> Tensor:
        """Put DALI's and PIL's rows into the order of the batch."""
        num = len(planned.batch.labels)
        mine = torch.ones(num, dtype=torch.bool)
        mine[planned.rows] = False
        order = torch.cat([planned.rows, mine.nonzero().squeeze(1)]).argsort()
        together = torch.cat([images, planned.batch.images.to(self.device, non_blocking=True)])
        return together.permute(0, 2, 3, 1)[order.to(self.device)].permute(0, 3, 1, 2)


def _mixed_hints(sizes: np.ndarray) -> dict[str, Any]:
    """Return arguments of the mixed decoder: hardware share, buffers for 99 % of the images."""
    width, height = np.percentile(sizes, 99, axis=0).astype(int).tolist()
    return {
        "hw_decoder_load": 0.65,
        "preallocate_width_hint": width,
        "preallocate_height_hint": height,
    }
