"""From settings to the parts of a run. Everything that a user can get wrong fails here, before a file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm

from dad_fast.cache import keep_compiled_code_private
from dad_fast.config.resolve import is_fixed
from dad_fast.config.schema import Config, EngineConfig
from dad_fast.data.loaders.loader import Batch
from dad_fast.data.sources.base import Source, open_source
from dad_fast.discretizers.base import Discretizer
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.device import resolve_device
from dad_fast.engine import frozen
from dad_fast.engine.generator import AttackGenerator, Generator, JointGenerator, Model
from dad_fast.engine.learner import JointLearner, Learner
from dad_fast.engine.preflight import check_same_classes, check_splits, check_weights
from dad_fast.engine.probe_features import FeatureTable
from dad_fast.engine.probe_step import ProbeData, ProbeGenerator, ProbeLearner
from dad_fast.engine.pseudo_labels import PseudoLabels, WeakView
from dad_fast.engine.step import TrainStep
from dad_fast.engine.stored import Stored, recorded_classes, view_settings
from dad_fast.engine.update import Update
from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.methods.registry import METHODS, Images
from dad_fast.models.optimizations import optimize_student
from dad_fast.models.probe import Probe, build_probe
from dad_fast.models.run_settings import take_view
from dad_fast.models.student import Student, build_student
from dad_fast.models.teacher import Teacher
from dad_fast.store import AdversarialStore, TargetStore


@dataclass(frozen=True)
class Components:
    """What a run is made of; `teacher` and `discretizer` are None where the method, given its stores, needs none."""

    device: torch.device
    train: Source
    val: Source
    student: Student
    teacher: Teacher | None
    discretizer: Discretizer | None
    stored: Stored
    savings: dict[
        str, dict[str, str]
    ]  # of teacher and student: saving -> "" where it is on, else why it is not
    hashes: dict[
        str, str | None
    ]  # of the weights of teacher and discretizer, None where nothing is trained
    probe: ProbeData | None = None  # where the student is a linear probe on the teacher's encoder

    def prepare(self, say: Callable[[str], None]) -> None:
        """Make what the steps need before the first of them; `say` gets lines for the log."""
        if self.probe is not None:
            self.probe.prepare(say)

    def join(self, batches: Iterator[Batch], pin_memory: bool) -> Iterator[Batch]:
        """`batches` with what stores and the teacher have said of them."""
        batches = self.stored.join(batches, pin_memory)
        return batches if self.probe is None else self.probe.join(batches, pin_memory)


class Builder:
    """Builds the parts of one run after another; frozen parts (data, teacher, discretizer) are shared between runs."""

    def __init__(self) -> None:
        self._frozen: dict[Any, Any] = {}

    def build(self, cfg: Config) -> Components:
        device = resolve_device(cfg.device)
        check_splits(cfg)
        if (
            not cfg.store.dirs
        ):  # what a store makes needless is known when it has been joined with the data
            check_weights(cfg, *_needs(cfg, None, None))
        data = repr(cfg.data), cfg.store.dirs
        train = self._once(
            ("source", cfg.data.train_split, *data), lambda: _source(cfg, cfg.data.train_split)
        )
        val = self._once(
            ("source", cfg.data.val_split, *data), lambda: _source(cfg, cfg.data.val_split)
        )
        check_same_classes(cfg, train.classes, val.classes)
        of_stores = ("stores", cfg.store.dirs, cfg.loss.filter, train.fingerprint)
        stored = self._once(of_stores, lambda: Stored(cfg.store.dirs, train, cfg.loss.filter))
        stored.check_form(cfg)
        needs_teacher, needs_discretizer = _needs(cfg, stored.adversarial, stored.targets)
        teacher = discretizer = None
        hashes: dict[str, str | None] = {}
        savings: dict[str, dict[str, str]] = {}
        common = (repr(cfg.precision), repr(cfg.engine), str(device))
        if needs_teacher:
            found = self._once(
                ("teacher", repr(cfg.teacher), *common, train.classes),
                lambda: frozen.teacher(cfg, train.classes, device),
            )
            teacher, hashes["teacher"], savings["teacher"], encoder_sha256 = found
        if needs_discretizer:
            of_discretizer = ("discretizer", repr(cfg.discretizer), *common)
            discretizer, hashes["discretizer"] = self._once(
                of_discretizer, lambda: frozen.discretizer(cfg, device)
            )
        torch.manual_seed(cfg.seed)  # the student's initial weights
        method = METHODS[cfg.method]
        if method.linear_probe:
            assert teacher is not None
            where = {
                "img_size": cfg.augment.img_size,
                "init": cfg.lp_clip.init,
                "init_from": cfg.student.init_from,
            }
            student: Student = build_probe(teacher, encoder_sha256, **where)
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
        if cfg.precision.channels_last:
            student = student.to(memory_format=torch.channels_last)
        stored.check_run(student.image_size, cfg.augment, hashes, cfg.store.mix_outputs)
        _try_one_image(cfg, device, student, teacher, discretizer)
        probe = (
            self._probe_data(cfg, train, student, hashes["teacher"], device)
            if isinstance(student, Probe)
            else None
        )
        return Components(
            device, train, val, student, teacher, discretizer, stored, savings, hashes, probe
        )

    def _probe_data(
        self,
        cfg: Config,
        source: Source,
        probe: Probe,
        teacher_hash: str | None,
        device: torch.device,
    ) -> ProbeData:
        """Shared between runs that differ in neither teacher nor views: a sweep over thresholds encodes its images once."""
        batch_size, workers = cfg.eval.batch_size or cfg.data.batch_size, cfg.data.workers
        how = {
            "teacher": teacher_hash,
            "precision": asdict(cfg.precision),
            "savings": sorted(cfg.engine.savings),
        }
        labels = features = None
        if cfg.lp_clip.labels == "pseudo":
            view = WeakView(probe.image_size, probe.crop_pct, probe.interpolation)
            made = PseudoLabels(probe.encoder, source, view, how, batch_size, workers, device)
            labels = self._once(("pseudo-labels", made.key), lambda: made)
        fixed = is_fixed(cfg.augment)
        if views := 1 if fixed else cfg.lp_clip.views:
            seed = 0 if fixed else cfg.seed
            view_of = repr(
                (
                    how,
                    source.fingerprint,
                    probe.image_size,
                    view_settings(cfg.augment),
                    seed,
                    views,
                    str(device),
                )
            )
            arguments = (
                probe.spec["num_features"],
                source,
                cfg.augment,
                probe.image_size,
                seed,
                views,
                batch_size,
                workers,
                device,
            )
            features = self._once(
                ("features", view_of), lambda: FeatureTable(probe.encoder.features, *arguments)
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
) -> TrainStep:
    """Assemble the training step of a run. This is where the whole configuration ends: its parts take their sections."""
    method = METHODS[cfg.method]
    engine = cfg.engine
    channels_last = cfg.precision.channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format
    learning: dict[str, Any] = {
        "loss": cfg.loss,
        "precision": cfg.precision,
        "smoothing": cfg.augment.smoothing,
        "bn": cfg.student.bn,
        "num_micro_batches": engine.grad_accum_steps,
        "fused": engine.step_kernels,
    }
    generator: Generator
    if isinstance(student, Probe):
        encode = _compiled(student.features, engine)
        generator = ProbeGenerator(student, cfg.lp_clip, layout, encode)
        threshold = cfg.lp_clip.threshold
        learner: Learner = ProbeLearner(method, student, update, threshold=threshold, **learning)
    else:
        is_joint = cfg.loss.form == "joint"
        generator = (JointGenerator if is_joint else AttackGenerator)(
            method,
            teacher if teacher is None else _compiled(teacher, engine),
            discretizer,
            attack=cfg.attack,
            loss=cfg.loss,
            store=cfg.store,
            num_classes=student.num_classes,
            image_size=student.image_size,
            layout=layout,
            fused=engine.step_kernels,
        )
        forward = _compiled(student, engine)
        learner = (JointLearner if is_joint else Learner)(
            method, student, update, forward=forward, **learning
        )
    return TrainStep(
        generator,
        [learner],
        num_micro_batches=engine.grad_accum_steps,
        cuda_graphs=engine.cuda_graphs,
    )


def _compiled(model: Model, engine: EngineConfig) -> Model:
    if not engine.torchcompile:
        return model
    keep_compiled_code_private()
    # dynamic=False: sizes are few, and which kernel a batch gets must not depend on the sizes before it, as after a resume.
    compiled: Model = torch.compile(model, dynamic=False)
    return compiled


def share_batch_norm(student: Student, device: torch.device) -> None:
    """--sync-bn: batch norms that see the images of all processes. Not yet run on a GPU."""
    if device.type != "cuda":
        raise EnvironmentProblem(
            f"--sync-bn: torch synchronizes batch norms on CUDA only, and the run is on {device}; leave it out"
        )
    student.model = convert_sync_batchnorm(student.model)


def _needs(
    cfg: Config, adversarial: AdversarialStore | None, targets: TargetStore | None
) -> tuple[bool, bool]:
    """Whether a teacher and a discretizer are needed, given these stores; raises UsageError when one is needed and not named."""
    method = METHODS[cfg.method]
    if method.linear_probe:
        return True, False
    online = method.uses(Images.ATTACK_TEACHER) and adversarial is None
    teacher = online or (method.teacher_logits(Images.CLEAN) and targets is None)
    only_codes = adversarial is not None and adversarial.manifest.images == "none"
    attacks_student = method.uses(Images.ATTACK_STUDENT)
    decodes = method.uses(Images.ATTACK_TEACHER) and only_codes
    discretizer = online or attacks_student or decodes
    if teacher and not cfg.teacher.name:
        missing = "adversarial images" if online else "outputs on clean images (--targets)"
        raise UsageError(
            f"--method {cfg.method} needs a teacher, for no store has its {missing}: add --teacher"
        )
    if discretizer and not cfg.discretizer.name:
        why = (
            "the store holds codes and no images"
            if only_codes
            else "no store has adversarial images"
        )
        raise UsageError(
            f"--method {cfg.method} needs a discretizer, for {why}: add --discretizer (a VQGAN's file, identity or jpeg:75)"
        )
    return teacher, discretizer


@torch.no_grad()
def _try_one_image(
    cfg: Config,
    device: torch.device,
    student: Student,
    teacher: Teacher | None,
    discretizer: Discretizer | None,
) -> None:
    """A size that a model cannot take shows here, in one line, and not in the first step."""
    side = student.image_size
    pixels = torch.zeros(1, 3, side, side, device=device)
    try:
        student.eval()(pixels)
    except RuntimeError as error:
        what = f"cannot take images of {side} px ({str(error).splitlines()[0]})"
        raise UsageError(
            f"--student {student.name} {what}; set --img-size or student.model_kwargs"
        ) from None
    if teacher is not None:
        teacher(pixels)
    if discretizer is not None:
        discretizer(pixels)


def _source(cfg: Config, split: str) -> Source:
    with distributed.main_first():  # of every machine: the others find its index
        data = cfg.data
        source = open_source(data.data_dir, split, data.class_map, max_bad_share=data.max_bad_share)
        recorded = None if data.class_map else recorded_classes(cfg.store.dirs)
        if (
            recorded is None
            or recorded == source.classes
            or set(recorded.folders) != set(source.classes.folders)
        ):
            return source  # whether these are a store's classes is for Stored to say
        return open_source(data.data_dir, split, classes=recorded, max_bad_share=data.max_bad_share)
