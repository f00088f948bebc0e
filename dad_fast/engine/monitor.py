"""Measurements of a run for its log: means of the steps' scalars, speed, GPU, unreadable files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dad_fast.config.schema import Config
from dad_fast.data.loaders.loader import Batch
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.build import Components
from dad_fast.engine.diagnostics import (
    attack_effects,
    attack_to_rounding,
    codes_changed,
    discretizer_fidelity,
)
from dad_fast.engine.meter import Meter, over_processes
from dad_fast.engine.notices import Advice
from dad_fast.engine.step import TrainStep
from dad_fast.engine.step_timer import StepTimer, Window
from dad_fast.loggers.gpu import Gpu

Say = Callable[[str], None]


class Monitor:
    """Collects what the log says about the steps, and advises the user."""

    def __init__(self, cfg: Config, parts: Components, step: TrainStep, loader: str) -> None:
        """Create a monitor of `step`. loader: the name of the run's loader."""
        self.step = step
        (self.learner,) = step.learners
        self.device = parts.device
        self.images_per_step = cfg.data.global_batch_size
        self.meter = Meter()
        self.clock = StepTimer(self.device)
        self.advice = Advice(cfg, parts, loader)
        self.gpu: Gpu | None = None
        if self.device.type == "cuda" and distributed.is_main():
            self.gpu = Gpu.open(self.device.index or 0)
        # Unreadable files in the batches of this process so far, and of any process.
        self.met: set[str] = set()
        self.bad_images: set[str] = set()

    def add(self, batch: Batch, scalars: dict[str, Tensor]) -> None:
        """Add one step: its batch, and its scalars on the device."""
        self.meter.add(scalars)
        self.met.update(batch.replaced)

    def peek(self) -> dict[str, float]:
        """Return the means since the last window, for the progress line."""
        return _to_show(self.meter.peek())

    def read(self) -> tuple[dict[str, float], Window]:
        """Return the means and the times since the last call, and start again."""
        # The means first: reading them waits for the device.
        means = _to_show(self.meter.read())
        self.clock.count()
        return means, self.clock.window()

    def window(
        self,
        read: tuple[dict[str, float], Window],
        batch: Batch,
        say: Say,
        known: dict[str, float],
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the measurements of a log window. A collective.

        read: from `read`. batch: the last one; the share of codes that the attack changes is
        measured on it. say: gets advice. known: what runs that share the batch have measured of
        attacks on the teacher; filled here. Returns the values of the progress line, and those for
        metrics.jsonl alone.
        """
        values, window = read
        values |= codes_changed(self.step.generator, self.learner, batch, known)
        largest = {"data_wait": window.waited / window.seconds}
        if self.device.type == "cuda":
            largest["gpu_memory"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        values = over_processes(values, largest)
        others: dict[str, Any] = {
            "img_per_s": window.steps * self.images_per_step / window.seconds,
            "bad_images": len(self.gathered_bad_images()),
        }
        if self.gpu:
            others["gpu"] = self.gpu.sample()
        self.advice.on_window(window, say)
        return values, others

    def attack(self, batch: Batch, say: Say) -> dict[str, float]:
        """Measure on a few images of the first batch what the attack changes.

        say: gets a warning if it changes little. Empty where no attack is made online.
        """
        where = self.step.generator, self.learner, batch
        values: dict[str, float] = {}
        ratio = attack_to_rounding(*where)
        if ratio is not None:
            values["signal_to_rounding"] = ratio
            self.advice.on_attack(ratio, say)
        for suffix, effect in attack_effects(*where).items():
            values[f"{effect.unit.replace(' ', '_')}_changed{suffix}"] = effect.changed
            values[f"answers_changed{suffix}"] = effect.answers
            self.advice.on_effect(effect, say)
        return values

    def fidelity(self, batch: Batch, say: Say) -> dict[str, Any]:
        """Compare a few images of the first batch before and after the discretizer.

        say: gets a warning if it does not fit them. Empty where no attack is made online.
        """
        found = discretizer_fidelity(self.step.generator, self.learner, batch)
        if found is None:
            return {}
        self.advice.on_fidelity(found, say)
        return found._asdict()

    def gathered_bad_images(self) -> list[str]:
        """Return the unreadable files that any process has met so far. A collective."""
        for names in distributed.all_gather_json(sorted(self.met - self.bad_images)):
            self.bad_images.update(names)
        return sorted(self.bad_images)


def _to_show(means: dict[str, float]) -> dict[str, float]:
    """Return the means of a log line: with `applied` only when a step was skipped."""
    return {name: mean for name, mean in means.items() if name != "applied" or mean != 1.0}
