"""One training step, in the order in which it happens: the file to read first.

    uint8 images -> x, y -> attack -> Q(x') -> teacher and student -> objective -> update
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..config.schema import Config
from ..data.loader import Batch
from ..data.mixing import mix, to_pixels
from ..methods.attack import PGD
from ..methods.discretize import discretize
from ..methods.objectives import TERMS, Logits, keep_mask, objective, smooth
from ..models.discretizer import Discretizer
from ..models.student import Student
from ..models.teacher import Teacher
from .update import Update


class TrainStep:
    """Computes the loss of a batch and updates the student. `teacher` and `discretizer` are None where the method needs none."""

    def __init__(self, cfg: Config, student: Student, teacher: Teacher | None, discretizer: Discretizer | None, update: Update):
        self.cfg, self.student, self.teacher, self.discretizer, self.update = cfg, student, teacher, discretizer, update
        self.terms = TERMS[cfg.method]
        self.attack = PGD.from_config(cfg.attack)
        self.device = next(student.parameters()).device

    def __call__(self, batch: Batch, step: int, lr: float) -> dict[str, Tensor]:
        """One step. Returns scalars on the device: the loss, its parts, the share kept by the filter, whether it was applied."""
        self.student.train()
        self.update.remember_buffers()
        loss, scalars = self.loss(batch)
        scalars["applied"] = self.update(loss, step, lr).float()
        return scalars

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        cfg, teacher = self.cfg, self.teacher
        batch = batch.to(self.device)
        num_classes = self.student.num_classes
        x, y, second_labels = mix(to_pixels(batch.images), batch, num_classes)  # [B, 3, H, W], [B, C], [B]
        if cfg.precision.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)

        # x + delta -> Q(x + delta): against the teacher (DAD), against the student (DAT)
        images = [x]
        if "dad" in self.terms or "aug" in self.terms:
            assert teacher is not None
            images.append(self.adversarial(teacher, x, y, batch.keys))
        if "dat" in self.terms:
            images.append(self.adversarial(self.student_in_eval, x, y, batch.keys))

        # The teacher on clean and on adversarial images; the second also serves the filter.
        keep = teacher_clean = teacher_dad = None
        with torch.no_grad():
            if "kd" in self.terms:
                teacher_clean = teacher(x)
            if "dad" in self.terms or ("aug" in self.terms and cfg.loss.filter):
                teacher_dad = teacher(images[1])
                if cfg.loss.filter:
                    keep = keep_mask(teacher_dad, batch.labels, second_labels)

        # The student on all of them.
        with self.autocast():
            if cfg.student.bn == "split":
                outputs = [self.student(group) for group in images]
            else:
                outputs = list(self.student(torch.cat(images)).chunk(len(images)))
        student_clean = outputs.pop(0)
        student_dat = outputs.pop() if "dat" in self.terms else None
        student_dad = outputs.pop() if outputs else None

        logits = Logits(student_clean, student_dad, student_dat, teacher_clean, teacher_dad)
        loss, parts = objective(cfg.method, cfg.loss, logits, smooth(y, cfg.augment.smoothing), keep)
        scalars = {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}
        if keep is not None:
            scalars["kept"] = keep.mean()
        return loss, scalars

    def adversarial(self, model: Teacher | object, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Q(x') for an attack on `model`, [B, 3, H, W]."""
        assert self.discretizer is not None and callable(model)
        return discretize(self.discretizer, model, self.attack, x, y, keys, self.cfg.attack.order).images

    def student_in_eval(self, x: Tensor) -> Tensor:
        """The student as DAT attacks it: fixed statistics and no dropout, so that the attack leaves no trace in the student."""
        self.student.eval()
        with self.autocast():
            logits = self.student(x)
        self.student.train()
        return logits

    def autocast(self) -> AbstractContextManager[None]:
        precision = self.cfg.precision
        return torch.autocast(self.device.type, getattr(torch, precision.student), enabled=precision.amp)
