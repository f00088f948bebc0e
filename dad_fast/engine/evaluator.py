"""Evaluation inside a run: with the student's view of images and the run's precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from dad_fast.config.schema import Config
from dad_fast.distributed.signals import stop_requests
from dad_fast.engine.build import Components
from dad_fast.evaluation.runner import Result, Suite, evaluate
from dad_fast.models.float32 import float32_math


class Evaluator:
    """Evaluates the models of a run on suites."""

    def __init__(
        self,
        cfg: Config,
        parts: Components,
        autocast: Callable[[], AbstractContextManager[None]],
        stopped: str,
    ) -> None:
        """Create an evaluator.

        autocast: of the student's forward pass. stopped: message of Preempted and Interrupted.
        """
        self.cfg = cfg
        self.parts = parts
        self.autocast = autocast
        self.stopped = stopped

    def __call__(
        self, model: nn.Module, suite: Suite, progress: Callable[[int, int], None] | None = None
    ) -> Result:
        """Evaluate `model`. A collective. progress: called with (images done, all images).

        Raises Preempted or Interrupted when a signal asks any process to stop.
        """
        cfg = self.cfg
        precision = float32_math(tf32=cfg.precision.tf32)
        with precision, self.autocast(), stop_requests():
            return evaluate(
                model,
                suite.source,
                name=suite.name,
                view=self.parts.student.view,
                batch_size=cfg.eval.batch_size or cfg.data.batch_size,
                workers=cfg.data.workers,
                device=self.parts.device,
                corruption=suite.corruption,
                progress=progress,
                stopped=self.stopped,
            )
