"""One student in the training loop: forward, loss terms, backward, update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from dad_fast.config.schema import LossConfig, PrecisionConfig
from dad_fast.engine.generator import Model, StepInputs
from dad_fast.engine.own_random import OwnRandom
from dad_fast.engine.update import Update
from dad_fast.loggers.profiling import stage
from dad_fast.methods.losses import joint_objective, objective, smooth
from dad_fast.methods.registry import Images, MethodSpec
from dad_fast.models.student import Student


class Learner:
    """Computes the loss of one student, adds up its gradients and updates it."""

    def __init__(
        self,
        method: MethodSpec,
        student: Student,
        update: Update,
        *,
        loss: LossConfig,
        precision: PrecisionConfig,
        smoothing: float,
        bn: str,
        num_micro_batches: int,
        fused: bool,
        forward: Model | None = None,
    ) -> None:
        """Create a learner.

        forward: computes the student's logits: the student by default, or its compiled form.
        bn: "split" calls the student once for each kind of images, otherwise once for all of them.
        fused: use the Triton kernel of the loss.
        """
        self.method = method
        self.student = student
        self.update = update
        self.loss_config = loss
        self.precision = precision
        self.smoothing = smoothing
        self.split = bn == "split"
        self.num_micro_batches = num_micro_batches
        self.fused = fused
        self.forward = student if forward is None else forward
        self.device = next(student.parameters()).device
        # Of a student that shares its batches; None = the global generators.
        self.random: OwnRandom | None = None
        # True if other students of the batch filter samples and this one learns from all of them.
        self.keeps_all = False

    def own_random(self) -> AbstractContextManager[None]:
        """Draw from the student's own random generators inside the block."""
        return nullcontext() if self.random is None else self.random.active()

    def see(self, side: int, layout: torch.memory_format) -> None:
        """From here on resize the images of a batch to `side`, in `layout`, on their device."""
        forward = self.forward

        def resized(images: Tensor) -> Tensor:
            if images.shape[-1] != side:
                images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
            return forward(images.contiguous(memory_format=layout))

        self.forward = resized

    def learn(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch to those before. Returns scalars on the device."""
        loss, scalars = self.loss(inputs)
        with stage("backward"):
            self.update.backward(loss / self.num_micro_batches)
        return scalars

    def loss(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and scalars: the loss, its terms, the share kept by the filter."""
        if self.keeps_all:
            inputs = inputs._replace(keep=None)
        with self.autocast(), stage("student"):
            logits = self._logits(inputs.images)
        with stage("objective"):
            loss, terms = self._objective(inputs, logits)
        scalars = {"loss": loss.detach()}
        scalars |= {name: value.detach() for name, value in terms.items()}
        if inputs.keep is not None:
            scalars["kept"] = inputs.keep.mean()
        return loss, scalars

    def in_eval(self, pixels: Tensor) -> Tensor:
        """Return the logits that an attack on the student sees.

        Batch statistics are fixed and dropout is off, so that the attack leaves no trace in the
        student.
        """
        self.student.eval()
        with self.autocast():
            logits = self.forward(pixels)
        self.student.train()
        return logits

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast of the student's forward pass, where the run uses mixed precision."""
        dtype = getattr(torch, self.precision.student)
        return torch.autocast(self.device.type, dtype, enabled=bool(self.precision.amp))

    def _logits(self, images: dict[Images, Tensor]) -> dict[Images, Tensor]:
        kinds = [kind for kind in self.method.image_kinds if kind in images]
        groups = [images[kind] for kind in kinds]
        if self.split:
            outputs = [self.forward(group) for group in groups]
        else:
            outputs = list(self.forward(torch.cat(groups)).chunk(len(groups)))
        return dict(zip(kinds, outputs, strict=True))

    def _objective(
        self, inputs: StepInputs, logits: dict[Images, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        targets = {kind: smooth(inputs.targets[kind], self.smoothing) for kind in logits}
        return objective(
            self.method,
            self.loss_config,
            logits,
            inputs.teacher,
            targets,
            inputs.keep,
            labelled=inputs.labelled,
            fused=self.fused,
        )


class JointLearner(Learner):
    """Learner of the authors' stored form: one loss over clean and adversarial images mixed with
    each other.
    """

    def _objective(
        self, inputs: StepInputs, logits: dict[Images, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kind = Images.CLEAN
        targets = smooth(inputs.targets[kind], self.smoothing)
        models = logits[kind], inputs.teacher[kind]
        return joint_objective(self.loss_config, *models, targets, inputs.keep, fused=self.fused)
