"""What tests ask of a training step with one student."""

from __future__ import annotations

from torch import Tensor

from dad_fast.data.loaders.steps import Batch
from dad_fast.engine.generator import StepInputs
from dad_fast.engine.learner import Learner
from dad_fast.engine.step import TrainStep


def learner_of(step: TrainStep) -> Learner:
    (learner,) = step.learners
    return learner


def inputs_of(step: TrainStep, batch: Batch) -> StepInputs:
    """Everything that the student learns from, its own attack included."""
    return step.generator.attack_student(step.generate(batch), batch, learner_of(step).in_eval)


def loss_of(step: TrainStep, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the student, and its terms."""
    return learner_of(step).loss(inputs_of(step, batch))


def run(step: TrainStep, *arguments) -> dict[str, Tensor]:
    """Make one step; the scalars of the student."""
    (scalars,) = step(*arguments)
    return scalars
