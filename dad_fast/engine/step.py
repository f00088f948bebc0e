"""One training step: the file to read first.

    batch -> Generator (attack -> discretizer -> teacher)            once
          -> Learner x n (student forward -> terms -> backward -> update)    once per student

A method is a set of loss terms (dad_fast/methods/registry.py); the step knows no method by name.
generator.py and learner.py are what it calls; the joint form and the linear probe are generators
and learners of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dad_fast.data.loaders.loader import Batch
from dad_fast.engine.cuda_graph import StepGraphs
from dad_fast.engine.generator import Generator, StepInputs
from dad_fast.engine.learner import Learner
from dad_fast.loggers.profiling import stage
from dad_fast.models.float32 import float32_math

Scalars = dict[str, Tensor]


class TrainStep:
    """Generates from a batch and updates every learner."""

    def __init__(
        self,
        generator: Generator,
        learners: Sequence[Learner],
        *,
        num_micro_batches: int,
        tf32: bool,
        cuda_graphs: str,
    ) -> None:
        """Create a step.

        num_micro_batches: a batch holds so many; their gradients make one update.
        tf32: use TF32 for what stays float32, except where the attack depends on it.
        cuda_graphs: "auto", "on" or "off".
        Raises EnvironmentProblem for "on" where graphs cannot be used.
        """
        self.generator = generator
        self.learners = list(learners)
        self.num_micro_batches = num_micro_batches
        self.tf32 = tf32
        self.device: torch.device = self.learners[0].device
        self.graphs = StepGraphs.if_wanted(
            cuda_graphs, self.device, self.generate, self.learn, self.learners
        )

    def __call__(self, batch: Batch, step: int, lr: float | Sequence[float]) -> list[Scalars]:
        """Make one step at learning rate `lr`, or at one for each learner.

        Returns for each learner scalars on the device: the loss, its terms, the share kept by the
        filter, and `applied`, 1 where the update was made. Each is the mean over the micro-batches.
        """
        with float32_math(tf32=self.tf32):
            rates = [lr] * len(self.learners) if isinstance(lr, float) else lr
            return self._step(batch, step, rates)

    def _step(self, batch: Batch, step: int, rates: Sequence[float]) -> list[Scalars]:
        for learner, lr in zip(self.learners, rates, strict=True):
            learner.student.train()
            learner.update.begin(step, lr)

        sums: list[Scalars] = [{} for _ in self.learners]
        for part in batch.to(self.device).split(self.num_micro_batches):
            results = self.graphs.learn(part) if self.graphs else self._learn(part)
            for total, scalars in zip(sums, results, strict=True):
                for name, value in scalars.items():
                    total[name] = value + total[name] if name in total else value.clone()

        for learner in self.learners:
            learner.update.reduce()
        with stage("update"):
            applied = self.graphs.apply() if self.graphs else self._apply()
        return [
            {name: value / self.num_micro_batches for name, value in total.items()}
            | {"applied": was_applied.float()}
            for total, was_applied in zip(sums, applied, strict=True)
        ]

    def generate(self, batch: Batch) -> StepInputs:
        """Make what the learners share: clean images, images that attack the teacher, and the
        teacher's logits.
        """
        return self.generator(batch)

    def learn(self, learner: Learner, batch: Batch, inputs: StepInputs) -> Scalars:
        """Add the gradients of one learner."""
        own = self.generator.attack_student(inputs, batch, learner.in_eval)
        return learner.learn(own)

    def _learn(self, batch: Batch) -> list[Scalars]:
        # What generation draws, it draws from the generators of the first learner.
        with self.learners[0].own_random():
            inputs = self.generate(batch)
        results = []
        for learner in self.learners:
            with learner.own_random():
                results.append(self.learn(learner, batch, inputs))
        return results

    def _apply(self) -> list[Tensor]:
        applied = []
        for learner in self.learners:
            with learner.own_random():
                applied.append(learner.update.apply())
        return applied
