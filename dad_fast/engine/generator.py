"""Inputs of the students: mix, attack, discretize, compute the teacher's logits.

No student weights get a gradient here. A generator is called once for a batch, however many
students learn from it. Images that attack a student are made for that student alone, by
`attack_student`. Everything works on static shapes and reads nothing on the host, so that
cuda_graph.py can capture it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dad_fast.config.schema import AttackConfig, LossConfig, StoreConfig
from dad_fast.data.augment.mixing import (
    Mixed,
    mix,
    partners,
    soft_targets,
    to_levels,
    to_pixels,
)
from dad_fast.data.loaders.loader import Batch
from dad_fast.discretizers.base import Discretizer
from dad_fast.loggers.profiling import stage
from dad_fast.methods.attack import PGD, discretize
from dad_fast.methods.losses import keep_mask, mixed_outputs
from dad_fast.methods.registry import Images, MethodSpec

Model = Callable[[Tensor], Tensor]


class StepInputs(NamedTuple):
    """Inputs of a student, for each kind of images that the method uses.

    In the joint form there is one kind, a batch of 2B images. For a linear probe `images` are
    features [B, F] and `targets` labels int64 [B].
    """

    images: dict[Images, Tensor]  # each [B, 3, H, W] in [0, 1]
    targets: dict[Images, Tensor]  # each [B, C], mixed, not smoothed
    teacher: dict[Images, Tensor]  # logits, each [B, C]
    keep: Tensor | None  # [B], the weight of a sample in filtered terms


class Generator(ABC):
    """Base class: makes the inputs of every learner from a batch on the device."""

    @abstractmethod
    def __call__(self, batch: Batch) -> StepInputs:
        """Make what all learners share."""

    def attack_student(self, inputs: StepInputs, batch: Batch, student: Model) -> StepInputs:
        """Add the images that attack `student`, where the method uses them."""
        return inputs


class AttackGenerator(Generator):
    """Generator of the paper's form: online, or from stores where the batch holds their content."""

    def __init__(
        self,
        method: MethodSpec,
        teacher: Model | None,
        discretizer: Discretizer | None,
        *,
        attack: AttackConfig,
        loss: LossConfig,
        store: StoreConfig,
        num_classes: int,
        image_size: int,
        layout: torch.memory_format,
        fused: bool,
    ) -> None:
        """Create a generator.

        teacher, discretizer: None where the method, given its stores, needs none.
        layout: the memory format of pixels. fused: use the Triton kernel of the attack's update.
        """
        self.method = method
        self.teacher = teacher
        self.discretizer = discretizer
        self.attack = PGD.from_config(attack, fused=fused)
        self.order = attack.order
        self.filter = loss.filter
        self.temperature = loss.temperature
        self.mix_outputs = store.mix_outputs
        self.num_classes = num_classes
        self.image_size = image_size
        self.layout = layout

    def __call__(self, batch: Batch) -> StepInputs:
        """Make clean images and images that attack the teacher, with the teacher's logits.

        batch: on the device.
        """
        with stage("mix"):
            mixed = self.mixed(batch)
        images = {Images.CLEAN: mixed.pixels}
        targets = {Images.CLEAN: mixed.targets, Images.ATTACK_STUDENT: mixed.targets}
        is_stored = batch.dad_outputs is not None

        if self.method.uses(Images.ATTACK_TEACHER):
            if is_stored:
                # Stored images are not mixed.
                images[Images.ATTACK_TEACHER] = self.stored_images(batch)
                targets[Images.ATTACK_TEACHER] = soft_targets(batch.labels, self.num_classes)
            else:
                found = self.adversarial(self.ask_teacher, mixed, batch.seeds)
                images[Images.ATTACK_TEACHER] = found
                targets[Images.ATTACK_TEACHER] = mixed.targets

        teacher, keep = self._teacher_logits(batch, images, mixed.second_labels)
        return StepInputs(images, targets, teacher, keep)

    def attack_student(self, inputs: StepInputs, batch: Batch, student: Model) -> StepInputs:
        if not self.method.uses(Images.ATTACK_STUDENT):
            return inputs
        clean, targets = inputs.images[Images.CLEAN], inputs.targets[Images.CLEAN]
        found = self._discretized(student, clean, targets, batch.seeds)
        return inputs._replace(images=inputs.images | {Images.ATTACK_STUDENT: found})

    def mixed(self, batch: Batch) -> Mixed:
        """Return pixels in [0, 1] and soft labels after mixup and CutMix.

        Labels are not smoothed: smoothing is the student's, not the attack's.
        """
        pixels = to_pixels(batch.images, self.layout)
        how = batch.mix_kind, batch.mix_lam, batch.mix_box
        return mix(pixels, batch.labels, *how, self.num_classes)

    def adversarial(self, model: Model, mixed: Mixed, keys: Tensor) -> Tensor:
        """Return Q(x') of an attack on `model`, [B, 3, H, W]."""
        return self._discretized(model, mixed.pixels, mixed.targets, keys)

    @torch.no_grad()
    def stored_images(self, batch: Batch) -> Tensor:
        """Return Q(x') from a store, [B, 3, H, W] in [0, 1].

        They are the 8-bit pixels from which the stored outputs were computed.
        """
        if batch.dad_images is not None:
            return to_pixels(batch.dad_images, self.layout)
        assert batch.dad_codes is not None and self.discretizer is not None
        grid = self.discretizer.code_grid(self.image_size)
        decoded = self.discretizer.decode_packed(batch.dad_codes, grid)
        return to_pixels(to_levels(decoded), self.layout)

    def ask_teacher(self, pixels: Tensor) -> Tensor:
        """Return the teacher's logits [B, C].

        Images of one layout: a compiled teacher has a form for each.
        """
        assert self.teacher is not None, (
            "the builder leaves a teacher out only where stores replace it"
        )
        return self.teacher(pixels.contiguous(memory_format=self.layout))

    def _discretized(self, model: Model, pixels: Tensor, targets: Tensor, keys: Tensor) -> Tensor:
        assert self.discretizer is not None
        with stage("attack"):
            how = self.attack, pixels, targets, keys, self.order
            return discretize(self.discretizer, model, *how).images

    def _teacher_logits(
        self, batch: Batch, images: dict[Images, Tensor], second_labels: Tensor
    ) -> tuple[dict[Images, Tensor], Tensor | None]:
        """Return the teacher's logits, stored or computed, and the filter.

        One forward pass serves both.
        """
        clean, adversarial, keep = batch.clean_outputs, batch.dad_outputs, batch.dad_kept
        if self.mix_outputs and clean is not None:
            others = clean[partners(len(clean), clean.device)]
            clean = mixed_outputs(clean, others, batch.mix_lam, self.temperature)

        on_clean = self.method.teacher_logits(Images.CLEAN)
        on_adversarial = self.method.teacher_logits(Images.ATTACK_TEACHER)
        filtered = self.filter and self.method.filters
        with torch.no_grad(), stage("teacher"):
            if on_clean and clean is None:
                clean = self.ask_teacher(images[Images.CLEAN])
            if adversarial is None and (on_adversarial or filtered):
                adversarial = self.ask_teacher(images[Images.ATTACK_TEACHER])
                if filtered:
                    keep = keep_mask(adversarial, batch.labels, second_labels)
        logits = {Images.CLEAN: clean, Images.ATTACK_TEACHER: adversarial}
        return {kind: found for kind, found in logits.items() if found is not None}, keep


class JointGenerator(AttackGenerator):
    """Generator of the authors' stored form: clean and stored adversarial images as one batch, each
    mixed with its partner's image of the other kind.
    """

    @torch.no_grad()
    def __call__(self, batch: Batch) -> StepInputs:
        lam = batch.mix_lam
        how = batch.labels, batch.mix_kind, lam, batch.mix_box, self.num_classes
        with stage("mix"):
            clean = to_pixels(batch.images, self.layout)
            adversarial = self.stored_images(batch)
            halves = mix(clean, *how, others=adversarial), mix(adversarial, *how, others=clean)
            images = torch.cat([half.pixels for half in halves])  # [2B, 3, H, W]
            targets = torch.cat([half.targets for half in halves])  # [2B, C]

        partner = partners(len(lam), lam.device)
        with stage("teacher"):
            teacher = self._joint_logits(batch, images, partner)
        keep = None
        if batch.dad_kept is not None:
            # 0 where an image shows anything of one that the filter rejects.
            of_clean = batch.dad_kept[partner].where(lam < 1, 1.0)
            of_adversarial = batch.dad_kept.where(lam > 0, 1.0)
            keep = torch.cat([of_clean, of_adversarial])
        kind = Images.CLEAN
        return StepInputs({kind: images}, {kind: targets}, {kind: teacher}, keep)

    def _joint_logits(self, batch: Batch, images: Tensor, partner: Tensor) -> Tensor:
        clean, adversarial = batch.clean_outputs, batch.dad_outputs
        if clean is None or adversarial is None:
            return self.ask_teacher(images)
        pairs = (clean, adversarial[partner]), (adversarial, clean[partner])
        how = batch.mix_lam, self.temperature
        return torch.cat([mixed_outputs(*pair, *how) for pair in pairs])
