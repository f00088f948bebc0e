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
from dad_fast.data.augment.records import NO_MIX
from dad_fast.data.loaders.loader import Batch
from dad_fast.data.sources.base import UNLABELLED
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
    labelled: Tensor | None = None  # [B], the weight of a sample in terms with labels


class CleanInputs(NamedTuple):
    """Clean images, and y of the attack and the filter: labels, or the teacher's predictions."""

    mixed: Mixed
    labels: Tensor  # int64 [B], y of the own image
    labelled: Tensor | None  # float32 [B], 1 where the images shown all have labels; None: all have
    logits: Tensor | None  # [B, C], the teacher's, where they are stored or were needed for y


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
        unlabelled: bool = False,
    ) -> None:
        """Create a generator.

        teacher, discretizer: None where the method, given its stores, needs none.
        layout: the memory format of pixels. fused: use the Triton kernel of the attack's update.
        unlabelled: batches may hold images without labels.
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
        self.unlabelled = unlabelled

    def __call__(self, batch: Batch) -> StepInputs:
        """Make clean images and images that attack the teacher, with the teacher's logits.

        batch: on the device.
        """
        clean = self.clean(batch)
        mixed = clean.mixed
        images = {Images.CLEAN: mixed.pixels}
        targets = {Images.CLEAN: mixed.targets, Images.ATTACK_STUDENT: mixed.targets}
        is_stored = batch.dad_outputs is not None

        if self.method.uses(Images.ATTACK_TEACHER):
            if is_stored:
                # Stored images are not mixed.
                images[Images.ATTACK_TEACHER] = self.stored_images(batch)
                targets[Images.ATTACK_TEACHER] = soft_targets(clean.labels, self.num_classes)
            else:
                found = self.adversarial(self.ask_teacher, mixed, batch.seeds)
                images[Images.ATTACK_TEACHER] = found
                targets[Images.ATTACK_TEACHER] = mixed.targets

        teacher, keep = self._teacher_logits(batch, images, clean)
        return StepInputs(images, targets, teacher, keep, clean.labelled)

    def attack_student(self, inputs: StepInputs, batch: Batch, student: Model) -> StepInputs:
        if not self.method.uses(Images.ATTACK_STUDENT):
            return inputs
        clean, targets = inputs.images[Images.CLEAN], inputs.targets[Images.CLEAN]
        found = self._discretized(student, clean, targets, batch.seeds)
        return inputs._replace(images=inputs.images | {Images.ATTACK_STUDENT: found})

    def clean(self, batch: Batch) -> CleanInputs:
        """Return the clean images with y.

        For images without labels y is the teacher's prediction on the pixels shown, also where one
        of two mixed images has a label.
        """
        with stage("mix"):
            mixed = self.mixed(batch)
        logits = self._stored_logits(batch)
        if not self.unlabelled:
            return CleanInputs(mixed, batch.labels, None, logits)

        known = batch.labels != UNLABELLED
        alone = batch.mix_kind == NO_MIX
        labelled = known & (known[partners(len(known), known.device)] | alone)
        labels = batch.labels.clamp(min=0)
        if self.method.uses(Images.ATTACK_TEACHER) and batch.dad_outputs is None:
            if logits is None:
                with torch.no_grad(), stage("teacher"):
                    logits = self.ask_teacher(mixed.pixels)
            answers = logits.argmax(dim=-1)
            own = soft_targets(answers, self.num_classes)
            labels = labels.where(labelled, answers)
            mixed = mixed._replace(
                targets=mixed.targets.where(labelled[:, None], own),
                second_labels=mixed.second_labels.where(labelled, answers),
            )
        return CleanInputs(mixed, labels, labelled.float(), logits)

    def mixed(self, batch: Batch) -> Mixed:
        """Return pixels in [0, 1] and soft labels after mixup and CutMix.

        Labels are not smoothed: smoothing is the student's, not the attack's.
        """
        pixels = to_pixels(batch.images, self.layout)
        how = batch.mix_kind, batch.mix_lam, batch.mix_box
        labels = batch.labels.clamp(min=0) if self.unlabelled else batch.labels
        return mix(pixels, labels, *how, self.num_classes)

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

    def _stored_logits(self, batch: Batch) -> Tensor | None:
        """Return the stored logits on the clean images, mixed if asked for."""
        stored = batch.clean_outputs
        if not self.mix_outputs or stored is None:
            return stored
        others = stored[partners(len(stored), stored.device)]
        return mixed_outputs(stored, others, batch.mix_lam, self.temperature)

    def _teacher_logits(
        self, batch: Batch, images: dict[Images, Tensor], inputs: CleanInputs
    ) -> tuple[dict[Images, Tensor], Tensor | None]:
        """Return the teacher's logits, stored or computed, and the filter.

        One forward pass serves both.
        """
        clean, adversarial, keep = inputs.logits, batch.dad_outputs, batch.dad_kept
        on_clean = self.method.teacher_logits(Images.CLEAN)
        on_adversarial = self.method.teacher_logits(Images.ATTACK_TEACHER)
        filtered = self.filter and self.method.filters
        with torch.no_grad(), stage("teacher"):
            if on_clean and clean is None:
                clean = self.ask_teacher(images[Images.CLEAN])
            if adversarial is None and (on_adversarial or filtered):
                adversarial = self.ask_teacher(images[Images.ATTACK_TEACHER])
                if filtered:
                    keep = keep_mask(adversarial, inputs.labels, inputs.mixed.second_labels)
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
