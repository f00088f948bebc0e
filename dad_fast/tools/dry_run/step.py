"""One step of a run on fake tensors: its models by their architectures, and an empty batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dad_fast.config.fields import with_values
from dad_fast.config.resolve import is_fixed
from dad_fast.config.schema import Config
from dad_fast.config.setting import Switch
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.loader import Batch
from dad_fast.discretizers.base import Discretized, Discretizer
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.engine.build import make_step
from dad_fast.engine.choices import DeviceFacts, choose
from dad_fast.engine.frozen import model_optimizations, needs_head, vqgan_optimizations
from dad_fast.engine.update import Update
from dad_fast.errors import DadFastError
from dad_fast.kernels.cases import GROUP_NORM_SILU
from dad_fast.loggers.profiling import name_method
from dad_fast.methods.registry import METHODS, Images
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.optimizations import optimize_student, optimize_teacher
from dad_fast.models.probe import build_probe
from dad_fast.models.student import Student, build_student
from dad_fast.models.teacher import Teacher
from dad_fast.tools.dry_run.trace import Recorder, Trace, fake_tensors, make_fake

META = torch.device("meta")
# Every GPU of rates.toml.
GPU = DeviceFacts("cuda", bfloat16=True)
Model = TypeVar("Model")


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    micro_batches: of `batch_size` images each, in the trace.
    teacher_pass: the teacher's forward pass on a batch, if asked for.
    code_bytes: of an image's codes. kept_views: views of an image whose features a linear probe
    keeps. parameters: by model. memory: bytes of what stays allocated, by name. notes: what could not be
    counted or had to be assumed.
    """

    trace: Trace
    batch_size: int
    micro_batches: int
    teacher_pass: Trace | None
    parameters: dict[str, int]
    memory: dict[str, int]
    image_size: int
    code_bytes: int
    kept_views: int
    notes: list[str]


def trace_step(
    cfg: Config,
    num_classes: int,
    stored: Collection[str] = (),
    *,
    several: bool = False,
    teacher_alone: bool = False,
) -> Step:
    """Trace a step of `cfg` on a GPU.

    stored: kinds of stores that it learns from: "adversarial" (with images), "codes", "targets".
    several: several GPUs share gradients. teacher_alone: trace a pass of the teacher, too.
    Raises the errors of a run for models that are unknown or cannot be built.
    """
    accumulated = min(2, cfg.engine.grad_accum_steps)
    static_gradients = several or cfg.engine.cuda_graphs != "off"
    engine = {"engine.cuda_graphs": "off", "engine.torchcompile": Switch.OFF}
    asked = with_values(cfg, {**engine, "engine.grad_accum_steps": accumulated})
    if asked.engine.kernels == "auto":
        asked = with_values(asked, {"engine.kernels": "on"})
    notes: list[str] = []
    cfg = choose(GPU).settled(asked)
    teacher, discretizer = _frozen_models(cfg, num_classes, stored, notes)
    is_probe = METHODS[cfg.method].linear_probe
    student = None if is_probe else _student(cfg, num_classes)
    cfg = choose(GPU, student).settled(asked)
    if student is not None and cfg.precision.channels_last:
        student = student.to(memory_format=torch.channels_last)
    with fake_tensors(), Recorder() as recorder:
        for part in (student, teacher, *_modules(discretizer)):
            if part is not None:
                make_fake(part)
                recorder.count(part)
        if student is None:
            assert teacher is not None
            student = build_probe(teacher, "", img_size=cfg.augment.img_size)
        side = student.image_size
        discretizer = _runnable(discretizer, side, notes)
        update = Update(student, cfg, torch.device("cpu"))
        # Any other optimizer reads the finite check, which a fake tensor cannot answer.
        update.skips_on_device = True
        step = make_step(cfg, student, teacher, discretizer, update)
        for parameter in update.parameters:
            parameter.grad = torch.empty_like(parameter)
        # Creates the optimizer's state.
        update.apply()
        if static_gradients:
            update.make_gradients_static()
        models = {
            "student": student,
            "teacher": teacher,
            "discretizer": next(iter(_modules(discretizer)), None),
        }
        parameters = {name: count(model) for name, model in models.items() if model is not None}
        memory = {
            "frozen models": _bytes(
                *(_tensors(model) for model in (teacher, *_modules(discretizer)) if model)
            ),
            "student": _bytes(_trained(student)),
            "gradients": _bytes([p.grad for p in update.parameters if p.grad is not None]),
            "optimizer": _bytes(
                value
                for state in update.optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ),
            "EMA": _bytes(_trained(update.ema.module)) if update.ema else 0,
        }
        update.begin(0, cfg.optim.lr)

        name_method(step, "generate", "generate")
        name_method(step, "learn", "learn")
        if discretizer is not None:
            for owner, method, name in discretizer.stages():
                name_method(owner, method, name)
        kept_views = 0
        if is_probe:
            kept_views = 1 if is_fixed(cfg.augment) else cfg.lp_clip.views
        kinds = {*stored, *(["features"] if kept_views else [])}
        code_bytes = _code_bytes(discretizer, side)
        batch_size = cfg.data.batch_size
        batch = _batch(batch_size * accumulated, side, num_classes, kinds, code_bytes, student)
        recorder.start()
        with recorder.naming_stages():
            step(batch, 0, cfg.optim.lr)
        trace = recorder.stop()
        teacher_pass = None
        if teacher is not None and teacher_alone:
            del step, update, batch
            recorder.start()
            with torch.no_grad():
                run = teacher if teacher.has_head else teacher.features
                run(torch.empty(batch_size, 3, side, side))
            teacher_pass = recorder.stop()
    return Step(
        trace,
        batch_size,
        accumulated,
        teacher_pass,
        parameters,
        memory,
        side,
        code_bytes,
        kept_views,
        notes,
    )


def needs(cfg: Config, stored: Collection[str]) -> tuple[bool, bool]:
    """Return (teacher is needed, discretizer is needed)."""
    method = METHODS[cfg.method]
    has_images = bool({"adversarial", "codes"} & set(stored))
    online = method.uses(Images.ATTACK_TEACHER) and not has_images
    on_clean = method.teacher_logits(Images.CLEAN) and "targets" not in stored
    teacher = method.linear_probe or online or on_clean
    return teacher, online or method.uses(Images.ATTACK_STUDENT) or "codes" in stored


def _frozen_models(
    cfg: Config, num_classes: int, stored: Collection[str], notes: list[str]
) -> tuple[Teacher | None, Discretizer | None]:
    classes = ClassMap(tuple((i, f"class{i}", f"class {i}") for i in range(num_classes)))
    needs_teacher, needs_discretizer = needs(cfg, stored)
    teacher, discretizer = None, None
    if needs_teacher:
        wanted = cfg.teacher, classes, cfg.precision
        teacher = on_meta(
            lambda device: load_teacher(
                *wanted, device, shapes_only=True, needs_head=needs_head(cfg)
            )
        )
        optimize_teacher(teacher, model_optimizations(cfg))
    if needs_discretizer:
        optimizations, micro_batch = vqgan_optimizations(cfg), cfg.engine.vqgan_micro_batch
        arguments = cfg.discretizer.name, cfg.precision
        discretizer = on_meta(
            lambda device: load_discretizer(
                *arguments, device, optimizations, shapes_only=True, micro_batch=micro_batch
            )
        )
        if cfg.engine.kernels == "on" and GROUP_NORM_SILU in discretizer.kernels:
            discretizer.use_kernel(GROUP_NORM_SILU, True)
        if discretizer.name != cfg.discretizer.name:
            notes.append(f"--discretizer {discretizer.name}")
    return teacher, discretizer


def _student(cfg: Config, num_classes: int) -> Student:
    own = replace(cfg.student, pretrained=False, weights="", init_from="")
    groups = len(METHODS[cfg.method].image_kinds)
    student = on_meta(lambda _: build_student(own, num_classes, cfg.augment.img_size, groups))
    optimize_student(student, model_optimizations(cfg))
    return student


def on_meta(make: Callable[[torch.device], Model]) -> Model:
    """Build a model without memory for its weights, or on the CPU if it needs values."""
    try:
        with torch.device(META):
            return make(META)
    except DadFastError:
        raise
    except RuntimeError:
        return make(torch.device("cpu"))


def _modules(discretizer: Discretizer | None) -> list[nn.Module]:
    parts = vars(discretizer).values() if discretizer is not None else ()
    return [part for part in parts if isinstance(part, nn.Module)]


class _Uncounted(Discretizer):
    """Stands for a discretizer that reads values, such as one that runs on the host."""

    provenance = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, pixels: Tensor) -> Discretized:
        return Discretized(pixels.detach() * 1.0, None)


def _runnable(discretizer: Discretizer | None, side: int, notes: list[str]) -> Discretizer | None:
    if discretizer is None:
        return None
    try:
        discretizer(torch.zeros(1, 3, side, side))
    except DadFastError:
        raise
    except Exception:
        notes.append(f"--discretizer {discretizer.name}: works on values, so it is not counted")
        return _Uncounted(discretizer.name)
    return discretizer


def _code_bytes(discretizer: Discretizer | None, side: int) -> int:
    if discretizer is None or not discretizer.code_bits:
        return 0
    return -(-math.prod(discretizer.code_grid(side)) * discretizer.code_bits // 8)


def _batch(
    size: int,
    side: int,
    num_classes: int,
    kinds: Collection[str],
    code_bytes: int,
    student: Student,
) -> Batch:
    """Make a batch without content, with the records of stores and probes that a run joins."""

    def images() -> Tensor:
        return torch.empty(size, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)

    numbers = torch.empty(size, dtype=torch.int64)
    found: dict[str, Any] = {}
    if {"adversarial", "codes"} & set(kinds):
        found["dad_outputs"] = torch.empty(size, num_classes, dtype=torch.float16)
        found["dad_kept"] = torch.empty(size)
    if "adversarial" in kinds:
        found["dad_images"] = images()
    if "codes" in kinds:
        found["dad_codes"] = torch.empty(size, code_bytes, dtype=torch.uint8)
    if "targets" in kinds:
        found["clean_outputs"] = torch.empty(size, num_classes, dtype=torch.float16)
    if "features" in kinds:
        found["features"] = torch.empty(size, student.spec["num_features"])
    return Batch(
        images=images(),
        labels=numbers,
        samples=numbers,
        seeds=numbers,
        mix_kind=numbers,
        mix_lam=torch.empty(size),
        mix_box=torch.empty(size, 4, dtype=torch.int64),
        epoch=0,
        step=0,
        replaced=(),
        pseudo_labels=numbers,
        confidence=torch.empty(size),
        **found,
    )


def count(model: nn.Module) -> int:
    """Return the number of parameters of a model; of a student those that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(parameter.numel() for parameter in trained or model.parameters())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _trained(student: nn.Module) -> list[Tensor]:
    """Return the tensors of a student without those of a frozen encoder."""
    kept = student.state_dict(keep_vars=True).values()
    return [tensor for tensor in kept if isinstance(tensor, Tensor)]


def _bytes(*groups: Iterable[Tensor]) -> int:
    unique = {id(tensor): tensor for group in groups for tensor in group}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())
