"""Build the components of a run from its settings.

User errors are raised here, before a file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dad_fast.config.resolve import is_fixed
from dad_fast.config.schema import Config
from dad_fast.config.setting import Switch
from dad_fast.config.variants import student_seed, with_batch_sizes
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.loader import Batch
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.splits import open_split
from dad_fast.data.sources.unlabelled import open_training
from dad_fast.discretizers.base import Discretizer
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.device import resolve_device
from dad_fast.engine import frozen
from dad_fast.engine.choices import COMPILE, Choice, Choices, DeviceFacts, choose, settle
from dad_fast.engine.compiling import backend_name, compiled, forms_of, try_compiling
from dad_fast.engine.generator import AttackGenerator, Generator, JointGenerator, Model
from dad_fast.engine.learner import JointLearner, Learner
from dad_fast.engine.preflight import (
    check_backend,
    check_files,
    check_same_classes,
    check_student,
    needed_models,
)
from dad_fast.engine.probe.features import FeatureTable
from dad_fast.engine.probe.pseudo_labels import PseudoLabels
from dad_fast.engine.probe.step import ProbeData, ProbeGenerator, ProbeLearner
from dad_fast.engine.schedule import total_steps
from dad_fast.engine.self_test import EVERY_KERNEL, Kernels, choose_kernels, step_cases
from dad_fast.engine.step import TrainStep
from dad_fast.engine.trials import try_one_image, try_training
from dad_fast.engine.update import Update
from dad_fast.kernels import cases
from dad_fast.methods.registry import METHODS
from dad_fast.models.load_student import take_view
from dad_fast.models.optimizations import optimize_student
from dad_fast.models.probe import Probe, build_probe, probe_views
from dad_fast.models.registry import teacher_settings
from dad_fast.models.student import Student, build_student, share_batch_norm
from dad_fast.models.teacher import Teacher
from dad_fast.store.join import Stored, recorded_classes, view_settings


@dataclass(frozen=True)
class Components:
    """Data, models and stores of a run.

    teacher, discretizer: None where the method, given its stores, needs none.
    savings: for teacher and student, optimization -> "" where it is on, else the reason why it is
    off.
    hashes: of the weights of teacher and discretizer; None for a discretizer without trained
    weights.
    kernels: the kernels that the run uses, each after its self-test.
    choices: what auto means for this device and student.
    probe: data of a linear probe on the teacher's encoder, None for other students.
    """

    device: torch.device
    train: Source
    val: Source
    student: Student
    teacher: Teacher | None
    discretizer: Discretizer | None
    stored: Stored
    savings: dict[str, dict[str, str]]
    hashes: dict[str, str | None]
    kernels: Kernels
    choices: Choices
    probe: ProbeData | None = None

    def prepare(self, log: Callable[[str], None]) -> None:
        """Make pseudo-labels and features before the first step; `log` gets lines of text."""
        if self.probe is not None:
            self.probe.prepare(log)

    def join(self, batches: Iterator[Batch], pin_memory: bool) -> Iterator[Batch]:
        """Add stored images, stored outputs and pseudo-labels to `batches`."""
        batches = self.stored.join(batches, pin_memory)
        return batches if self.probe is None else self.probe.join(batches, pin_memory)


class Builder:
    """Builds the components of one run after another; runs share data, teacher and discretizer."""

    def __init__(self) -> None:
        self._frozen: dict[Any, Any] = {}

    def build(self, cfg: Config) -> Components:
        """Build the components of a run.

        Raises UsageError, DataError or EnvironmentProblem for settings that fail.
        """
        device = resolve_device(cfg.device)
        asked, cfg = cfg, settle(cfg, device)
        check_files(cfg)
        check_student(cfg)
        check_backend(cfg)

        train = self._source(cfg, cfg.data.train_split, training=True)
        val = self._source(cfg, cfg.data.val_split)
        check_same_classes(cfg, train.classes, val.classes)
        store_key = ("stores", cfg.store.dirs, cfg.loss.filter, train.fingerprint)
        stored = self._once(store_key, lambda: Stored(cfg.store.dirs, train, cfg.loss.filter))
        stored.check_form(cfg)

        adversarial = stored.adversarial.manifest if stored.adversarial is not None else None
        needs_teacher, needs_discretizer = needed_models(
            cfg, adversarial, targets=stored.targets is not None
        )
        teacher = discretizer = None
        hashes: dict[str, str | None] = {}
        savings: dict[str, dict[str, str]] = {}
        common = (repr(cfg.precision), repr(cfg.engine), str(device))
        if needs_teacher:
            found: frozen.FrozenTeacher = self._once(
                ("teacher", repr(teacher_settings(cfg)), *common, train.classes),
                lambda: frozen.teacher(cfg, train.classes, device),
            )
            teacher = found.model
            if frozen.needs_head(cfg):
                # A run before this one may have needed none.
                teacher.check_head()
            # Members come first, so that an error about a store names the one that differs.
            hashes |= {**found.member_fingerprints, "teacher": found.fingerprint}
            savings["teacher"] = found.savings
        if needs_discretizer:
            discretizer, hashes["discretizer"] = self._once(
                ("discretizer", repr(cfg.discretizer), *common),
                lambda: frozen.discretizer(cfg, device),
            )

        # Seeds the student's initial weights.
        torch.manual_seed(student_seed(cfg))
        method = METHODS[cfg.method]
        if method.linear_probe:
            assert teacher is not None
            student: Student = build_probe(
                teacher,
                found.encoder_fingerprint,
                img_size=cfg.augment.img_size,
                init=cfg.lp_clip.init,
                init_from=cfg.student.init_from,
            )
        else:
            num_groups = len(method.image_kinds)
            student = build_student(
                cfg.student, len(train.classes), cfg.augment.img_size, num_groups
            )
            savings["student"] = optimize_student(student, frozen.model_optimizations(cfg))
        take_view(student, cfg)
        student = student.to(device)
        if cfg.student.sync_bn:
            share_batch_norm(student, device)
        sized = with_batch_sizes(asked, distributed.world())
        num_steps = total_steps(sized, len(train) // sized.data.global_batch_size)
        choices = choose(DeviceFacts.of(device), student, num_steps)
        if choices.settled(asked).precision.channels_last:
            student = student.to(memory_format=torch.channels_last)

        stored.check_run(student.image_size, cfg.augment, hashes, cfg.store.mix_outputs)
        kernels = self._kernels(cfg, discretizer, device, student.image_size, len(train.classes))
        try_one_image(device, student, teacher, discretizer)
        if not method.linear_probe:
            try_training(device, student, cfg, len(method.image_kinds))
        probe: ProbeData | None = None
        if isinstance(student, Probe):
            probe = self._probe_data(cfg, train, student, hashes["teacher"], device)
        parts = Components(
            device,
            train,
            val,
            student,
            teacher,
            discretizer,
            stored,
            savings,
            hashes,
            kernels,
            choices,
            probe,
        )
        return self._try_compiling(sized, parts)

    def _kernels(
        self,
        cfg: Config,
        discretizer: Discretizer | None,
        device: torch.device,
        side: int,
        num_classes: int,
    ) -> Kernels:
        precision, temperature = cfg.precision, cfg.loss.temperature
        dtype = getattr(torch, precision.student) if precision.amp else torch.float32
        batch_size = cfg.data.batch_size
        key = (
            "kernels",
            cfg.engine,
            precision,
            cfg.attack,
            temperature,
            cfg.discretizer if discretizer is not None else None,
            *(device, side, num_classes, batch_size),
        )

        def choose() -> Kernels:
            own = step_cases(device, side, num_classes, cfg.attack, dtype, temperature)
            return choose_kernels(cfg.engine, device, own, discretizer, side, batch_size)

        chosen: Kernels = self._once(key, choose)
        return chosen

    def _try_compiling(self, cfg: Config, parts: Components) -> Components:
        """Return `parts` with the outcome of the trial; runs of equal models share it.

        cfg: with the batch sizes of a process, and "auto" as the user set it.
        """
        settled = parts.choices.settled(cfg)
        if not settled.engine.torchcompile:
            return parts
        student = parts.student
        is_stored = parts.stored.adversarial is not None
        keeps_features = parts.probe is not None and parts.probe.features is not None

        def outcome() -> Choice:
            forms = forms_of(settled, student, parts.teacher, is_stored, keeps_features)
            wanted = cfg.engine.torchcompile != Switch.AUTO
            return try_compiling(forms, settled, parts.device, wanted)

        models = cfg.method, cfg.student, cfg.teacher, settled.precision, settled.engine
        shapes = student.image_size, student.num_classes, cfg.data.batch_size, cfg.loss.form
        key = ("compiling", repr(models), shapes, is_stored, keeps_features, str(parts.device))
        choice = self._once(key, outcome)
        return replace(parts, choices=parts.choices.with_choice(COMPILE, choice))

    def _source(self, cfg: Config, split: str, training: bool = False) -> Source:
        key = ("source", split, training, repr(cfg.data), cfg.store.dirs)
        source: Source = self._once(key, lambda: _open_source(cfg, split, training))
        return source

    def _probe_data(
        self,
        cfg: Config,
        source: Source,
        probe: Probe,
        teacher_hash: str | None,
        device: torch.device,
    ) -> ProbeData:
        """Create pseudo-labels and features, shared between runs of the same teacher and views.

        So a sweep over thresholds encodes its images once.
        """
        batch_size = cfg.eval.batch_size or cfg.data.batch_size
        workers = cfg.data.workers
        identity = {
            "teacher": teacher_hash,
            "precision": asdict(cfg.precision),
            "savings": sorted(cfg.engine.savings),
        }
        labels = features = None
        if cfg.lp_clip.labels == "pseudo":
            made = PseudoLabels(
                probe.encoder, source, probe.view, identity, batch_size, workers, device
            )
            labels = self._once(("pseudo-labels", made.key), lambda: made)
        augment = probe_views(cfg.augment, probe)
        fixed = is_fixed(augment)
        views = 1 if fixed else cfg.lp_clip.views
        if views:
            seed = 0 if fixed else cfg.seed
            key = (
                identity,
                source.fingerprint,
                probe.image_size,
                view_settings(augment),
                seed,
                views,
                str(device),
            )
            arguments = (
                probe.spec["num_features"],
                source,
                augment,
                probe.image_size,
                seed,
                views,
                batch_size,
                workers,
                device,
            )
            features = self._once(
                ("features", repr(key)), lambda: FeatureTable(probe.encoder.features, *arguments)
            )
        return ProbeData(labels, features)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._frozen:
            self._frozen[key] = make()
        return self._frozen[key]


def make_step(
    cfg: Config,
    student: Student,
    teacher: Teacher | None,
    discretizer: Discretizer | None,
    update: Update,
    kernels: Kernels | None = None,
) -> TrainStep:
    """Assemble the training step of a run.

    kernels: those that passed their self-test; None = all of them if `engine.kernels` is "on".
    Functions below take the section of the configuration that they use.
    """
    method = METHODS[cfg.method]
    if cfg.data.labels == "teacher":
        method = method.without_labels()
    engine = cfg.engine
    if kernels is None:
        kernels = EVERY_KERNEL if engine.kernels == "on" else Kernels()
    channels_last = cfg.precision.channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def maybe_compiled(model: Model) -> Model:
        if not engine.torchcompile:
            return model
        return compiled(model, backend_name(engine.torchcompile))

    learning: dict[str, Any] = {
        "loss": cfg.loss,
        "precision": cfg.precision,
        "smoothing": cfg.augment.smoothing,
        "bn": cfg.student.bn,
        "num_micro_batches": engine.grad_accum_steps,
        "fused": kernels.uses(cases.DISTILLATION_LOSS),
    }
    generator: Generator
    if isinstance(student, Probe):
        encode = maybe_compiled(student.features)
        generator = ProbeGenerator(student, cfg.lp_clip, layout, encode)
        threshold = cfg.lp_clip.threshold
        learner: Learner = ProbeLearner(method, student, update, threshold=threshold, **learning)
    else:
        is_joint = cfg.loss.form == "joint"
        generator = (JointGenerator if is_joint else AttackGenerator)(
            method,
            teacher if teacher is None else maybe_compiled(teacher),
            discretizer,
            attack=cfg.attack,
            loss=cfg.loss,
            store=cfg.store,
            num_classes=student.num_classes,
            image_size=student.image_size,
            layout=layout,
            fused=kernels.uses(cases.PGD_UPDATE),
            unlabelled=cfg.data.labels == "teacher" or bool(cfg.data.extra_data),
        )
        forward = maybe_compiled(student)
        learner = (JointLearner if is_joint else Learner)(
            method, student, update, forward=forward, **learning
        )
    return TrainStep(
        generator,
        [learner],
        num_micro_batches=engine.grad_accum_steps,
        tf32=cfg.precision.tf32,
        cuda_graphs=engine.cuda_graphs,
    )


def _open_source(cfg: Config, split: str, training: bool) -> Source:
    """Open a split, in the order of classes that a store recorded if it has the same classes."""

    def opened(fixed: ClassMap | None = None) -> Source:
        return open_training(cfg.data, fixed) if training else open_split(cfg.data, split, fixed)

    # The first process of every machine writes the index, the others read it.
    with distributed.main_first():
        source = opened()
        recorded = None if cfg.data.class_map else recorded_classes(cfg.store.dirs)
        if recorded is None or recorded == source.classes:
            return source
        # For other classes Stored raises the error.
        has_same = set(recorded.folders) == set(source.classes.folders)
        return opened(recorded) if has_same else source
