"""One training step, in the order in which it happens: the file to read first.

    uint8 images -> x, y -> attack -> Q(x') -> teacher and student -> objective -> update

`generate` is all that needs no gradient of the student's weights, `learn` the rest; both work on static shapes and read nothing on the
host, so that graph.py can capture each in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.cache import keep_compiled_code_private
from dad_fast.config.schema import Config
from dad_fast.data.augment.mixing import Mixed, mix, partners, soft_targets, to_levels, to_pixels
from dad_fast.data.loaders.loader import Batch
from dad_fast.discretizers.base import Discretizer
from dad_fast.engine.cuda_graph import StepGraphs
from dad_fast.engine.diagnostics import share_changed, signal_to_rounding
from dad_fast.engine.update import Update
from dad_fast.loggers.profiling import stage
from dad_fast.methods.attack import PGD
from dad_fast.methods.discretize import discretize, perturb
from dad_fast.methods.losses import (
    TERMS,
    Logits,
    joint_objective,
    keep_mask,
    mixed_outputs,
    objective,
    smooth,
)
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher

MEASURED = 16  # images whose codes are compared at a log step


class Generated(NamedTuple):
    """What the student learns from: its images (clean, then those of each attack), labels, and what the teacher says of them.

    In the joint form `images` is one batch of both kinds, and what is said of clean images here is said of its 2B images.
    """

    images: list[Tensor]  # each [B, 3, H, W]
    targets: Tensor  # [B, C], mixed, not smoothed
    dad_targets: Tensor  # [B, C], the same for Q(x')
    teacher_clean: Tensor | None  # [B, C]
    teacher_dad: Tensor | None  # [B, C]
    keep: Tensor | None  # [B], 1 where the adversarial image counts


class TrainStep:
    """Computes the loss of a batch and updates the student. `teacher` and `discretizer` are None where the method needs none."""

    def __init__(
        self,
        cfg: Config,
        student: Student,
        teacher: Teacher | None,
        discretizer: Discretizer | None,
        update: Update,
    ):
        self.cfg, self.student, self.teacher, self.discretizer, self.update = (
            cfg,
            student,
            teacher,
            discretizer,
            update,
        )
        self.terms = TERMS.get(cfg.method, ())  # a linear probe's are its own: lp_clip.py
        self.attack = PGD.from_config(cfg.attack, fused=cfg.engine.step_kernels)
        self.device = next(student.parameters()).device
        self.layout = (
            torch.channels_last if cfg.precision.channels_last else torch.contiguous_format
        )
        self.run_student: Callable[[Tensor], Tensor] = student
        self.run_teacher: Callable[[Tensor], Tensor] | None = teacher
        if cfg.engine.torchcompile:
            keep_compiled_code_private()
            # dynamic=False: sizes are few, and which kernel a batch gets must not depend on the sizes met before it, as after a resume.
            self.run_student = torch.compile(student, dynamic=False)
            self.run_teacher = (
                torch.compile(teacher, dynamic=False) if teacher is not None else None
            )
        self.graphs = StepGraphs.if_wanted(
            cfg.engine.cuda_graphs, self.device, self.generate, self.learn, update
        )

    def __call__(self, batch: Batch, step: int, lr: float) -> dict[str, Tensor]:
        """One step. Returns scalars on the device: the loss, its parts, the share kept by the filter, whether it was applied.

        The batch holds `engine.grad_accum_steps` micro-batches; every scalar is the mean over them.
        """
        self.student.train()
        self.update.begin(step, lr)
        num_parts = self.cfg.engine.grad_accum_steps
        sums: dict[str, Tensor] = {}
        for part in batch.to(self.device).split(num_parts):
            scalars = self.graphs.learn(part) if self.graphs else self.learn(self.generate(part))
            sums = {
                name: value + sums[name] if sums else value.clone()
                for name, value in scalars.items()
            }
        self.update.reduce()
        with stage("update"):
            applied = self.graphs.apply() if self.graphs else self.update.apply()
        return {name: value / num_parts for name, value in sums.items()} | {
            "applied": applied.float()
        }

    def generate(self, batch: Batch) -> Generated:
        """Attack, discretizer and teacher, for a batch on the device."""
        cfg = self.cfg
        if cfg.loss.form == "joint":
            return self.generate_joint(batch)
        with stage("mix"):
            x, y, second_labels, _ = self.mixed(batch)  # [B, 3, H, W], [B, C], [B]

        # x + delta -> Q(x + delta): against the teacher (DAD, or from a store), against the student (DAT)
        images, stored = [x], batch.dad_outputs is not None
        if "dad" in self.terms or "aug" in self.terms:
            images.append(
                self.stored_images(batch)
                if stored
                else self.adversarial(self._teacher(), x, y, batch.seeds)
            )
        if "dat" in self.terms:
            images.append(self.adversarial(self.student_in_eval, x, y, batch.seeds))

        # The teacher on clean and on adversarial images; the second also serves the filter.
        keep, teacher_clean, teacher_dad = batch.dad_kept, batch.clean_outputs, batch.dad_outputs
        if cfg.store.mix_outputs and teacher_clean is not None:
            partner = partners(len(teacher_clean), self.device)
            teacher_clean = mixed_outputs(
                teacher_clean, teacher_clean[partner], batch.mix_lam, cfg.loss.temperature
            )
        with torch.no_grad(), stage("teacher"):
            if "kd" in self.terms and teacher_clean is None:
                teacher_clean = self._teacher()(x)
            if not stored and ("dad" in self.terms or ("aug" in self.terms and cfg.loss.filter)):
                teacher_dad = self._teacher()(images[1])
                if cfg.loss.filter:
                    keep = keep_mask(teacher_dad, batch.labels, second_labels)
        labels = (
            soft_targets(batch.labels, self.student.num_classes) if stored else y
        )  # stored images are not mixed
        return Generated(images, y, labels, teacher_clean, teacher_dad, keep)

    @torch.no_grad()
    def generate_joint(self, batch: Batch) -> Generated:
        """Clean images and stored adversarial ones as one batch: each is mixed with its partner's image of the other kind."""
        num_classes, lam = self.student.num_classes, batch.mix_lam
        how = batch.labels, batch.mix_kind, lam, batch.mix_box, num_classes
        with stage("mix"):
            clean, adversarial = to_pixels(batch.images, self.layout), self.stored_images(batch)
            halves = mix(clean, *how, others=adversarial), mix(adversarial, *how, others=clean)
            images, targets = (
                torch.cat([half.pixels for half in halves]),
                torch.cat([half.targets for half in halves]),
            )  # [2B, ...]
        partner, of_clean, of_dad = (
            partners(len(lam), self.device),
            batch.clean_outputs,
            batch.dad_outputs,
        )
        with stage("teacher"):
            if of_clean is None or of_dad is None:
                teacher = self._teacher()(images)
            else:
                pairs = (of_clean, of_dad[partner]), (of_dad, of_clean[partner])
                teacher = torch.cat(
                    [mixed_outputs(*pair, lam, self.cfg.loss.temperature) for pair in pairs]
                )
        keep = None
        if (
            batch.dad_kept is not None
        ):  # 0 where anything is shown of an image that the filter rejects
            keep = torch.cat(
                [batch.dad_kept[partner].where(lam < 1, 1.0), batch.dad_kept.where(lam > 0, 1.0)]
            )
        return Generated([images], targets, targets, teacher, None, keep)

    def learn(self, generated: Generated) -> dict[str, Tensor]:
        """The student's gradients, added to those of earlier micro-batches; returns scalars."""
        loss, scalars = self.loss(generated)
        with stage("backward"):
            self.update.backward(loss / self.cfg.engine.grad_accum_steps)
        return scalars

    def loss(self, generated: Generated) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the student on what was generated, and scalars: the loss, its parts, the share kept."""
        cfg, (images, targets, dad_targets, teacher_clean, teacher_dad, keep) = self.cfg, generated
        with self.autocast(), stage("student"):
            if cfg.student.bn == "split":
                outputs = [self.run_student(group) for group in images]
            else:
                outputs = list(self.run_student(torch.cat(images)).chunk(len(images)))
        student_clean = outputs.pop(0)
        student_dat = outputs.pop() if "dat" in self.terms else None
        student_dad = outputs.pop() if outputs else None

        with stage("objective"):
            smoothing, fused = cfg.augment.smoothing, cfg.engine.step_kernels
            soft = smooth(targets, smoothing)
            if cfg.loss.form == "joint":
                assert teacher_clean is not None
                loss, parts = joint_objective(
                    cfg.loss, student_clean, teacher_clean, soft, keep, fused=fused
                )
            else:
                logits = Logits(student_clean, student_dad, student_dat, teacher_clean, teacher_dad)
                loss, parts = objective(
                    cfg.method,
                    cfg.loss,
                    logits,
                    soft,
                    keep,
                    smooth(dad_targets, smoothing),
                    fused=fused,
                )
        scalars = {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}
        if keep is not None:
            scalars["kept"] = keep.mean()
        return loss, scalars

    def mixed(self, batch: Batch) -> Mixed:
        """Pixels in [0, 1] and soft labels, after mixup and CutMix; not smoothed: smoothing is the student's, not the attack's."""
        pixels = to_pixels(batch.images, self.layout)
        return mix(
            pixels,
            batch.labels,
            batch.mix_kind,
            batch.mix_lam,
            batch.mix_box,
            self.student.num_classes,
        )

    def _teacher(self) -> Callable[[Tensor], Tensor]:
        assert self.run_teacher is not None, (
            "the builder leaves a teacher out only where stores replace it"
        )
        return self.run_teacher

    @torch.no_grad()
    def stored_images(self, batch: Batch) -> Tensor:
        """Q(x') from a store, [B, 3, H, W] in [0, 1]: the 8-bit pixels that the stored outputs belong to."""
        if batch.dad_images is not None:
            return to_pixels(batch.dad_images, self.layout)
        assert batch.dad_codes is not None and self.discretizer is not None
        grid = self.discretizer.code_grid(self.student.image_size)
        decoded = self.discretizer.decode_packed(batch.dad_codes, grid)
        return to_pixels(to_levels(decoded), self.layout)

    def adversarial(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, keys: Tensor
    ) -> Tensor:
        """Q(x') for an attack on `model`, [B, 3, H, W]."""
        assert self.discretizer is not None
        with stage("attack"):
            return discretize(
                self.discretizer, model, self.attack, x, y, keys, self.cfg.attack.order
            ).images

    def measure(self, batch: Batch) -> dict[str, float]:
        """The share of codes that the attack changes, over a few images: at log steps only, for it costs two more encoder passes."""
        if self.discretizer is None:
            return {}
        batch = batch.to(self.device)
        x, y, _, _ = self.mixed(batch)
        few = slice(0, MEASURED)
        shares = {}
        attacked: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.teacher is not None and batch.dad_outputs is None:
            attacked["codes_changed"] = self.teacher
        if "dat" in self.terms:
            attacked["codes_changed_dat"] = self.student_in_eval
        for name, model in attacked.items():
            base, perturbed = perturb(
                self.discretizer,
                model,
                self.attack,
                x[few],
                y[few],
                batch.seeds[few],
                self.cfg.attack.order,
            )
            with torch.no_grad():
                before, after = self.discretizer(base).codes, self.discretizer(perturbed).codes
            if before is not None and after is not None:
                shares[name] = share_changed(after, before).item()
        return shares

    def signal_to_rounding(self, batch: Batch) -> float | None:
        """How much the attack moves the encoder's output, over how much the encoder's own rounding does; None without an encoder."""
        stored = batch.dad_outputs is not None and "dat" not in self.terms
        encoders = None if self.discretizer is None or stored else self.discretizer.encoders()
        if self.discretizer is None or encoders is None:
            return None
        batch = batch.to(self.device)
        x, y, _, _ = self.mixed(batch)
        few = slice(0, 2)
        model = self.teacher or self.student_in_eval
        base, perturbed = perturb(
            self.discretizer,
            model,
            self.attack,
            x[few],
            y[few],
            batch.seeds[few],
            self.cfg.attack.order,
        )
        with torch.no_grad():
            return signal_to_rounding(*encoders, base, perturbed).item()

    def student_in_eval(self, x: Tensor) -> Tensor:
        """The student as DAT attacks it: fixed statistics and no dropout, so that the attack leaves no trace in the student."""
        self.student.eval()
        with self.autocast():
            logits = self.run_student(x)
        self.student.train()
        return logits

    def autocast(self) -> AbstractContextManager[None]:
        precision = self.cfg.precision
        return torch.autocast(
            self.device.type, getattr(torch, precision.student), enabled=precision.amp
        )
