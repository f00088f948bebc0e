"""Training steps for tests of CUDA graphs, on a GPU or on the tape of tests/graph_tape.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import tests.engine.test_step as small
from dad_fast.config.schema import (
    AttackConfig,
    Config,
    DataConfig,
    EngineConfig,
    LossConfig,
    LpClipConfig,
    PrecisionConfig,
    StoreConfig,
    StudentConfig,
)
from dad_fast.data.loaders.loader import Batch
from dad_fast.data.sources.base import UNLABELLED
from dad_fast.engine.build import make_step
from dad_fast.engine.cuda_graph import WARM_UP
from dad_fast.engine.step import TrainStep
from dad_fast.engine.update import Update
from dad_fast.kernels.pack_codes import packed_bytes
from dad_fast.methods.registry import METHODS
from dad_fast.models.probe import build_probe
from dad_fast.models.student import build_student
from tests.models.test_optimizations import timm_teacher
from tests.steps import learner_of, run

B, C, SIDE = small.B, small.C, small.SIDE
METHOD_NAMES = small.METHOD_NAMES
STEPS = WARM_UP + 3
LAYER_NORM = replace(small.LAYER_NORM, drop_path=0.3)
BATCH_NORM = replace(small.BATCH_NORM, drop_path=0.5)
STUDENTS = {"ln": LAYER_NORM, "bn": BATCH_NORM}
CONFIG = Config()
BF16 = PrecisionConfig(amp=True, student="bfloat16")
FP16 = PrecisionConfig(amp=True, student="float16")
STORE = StoreConfig(dirs=("a store",))
MIXED_STORE = StoreConfig(dirs=("a store",), mix_outputs=True)


@dataclass(frozen=True)
class Case:
    """Settings of a step and what its batches hold."""

    method: str = "dad"
    student: StudentConfig = LAYER_NORM
    parts: int = 1
    optim: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)  # of the Config
    kernels: bool = False
    timm_teacher: bool = False  # a real one, which casts its weights; else a linear layer
    num_processes: int = 0  # pretended, for the arithmetic of shared gradients
    images: str = ""  # stored adversarial images: "images", "codes" or none
    outputs: bool = False  # stored outputs on clean images
    features: bool = False  # kept features of a linear probe
    bad_steps: tuple[int, ...] = ()  # whose batches hold NaN

    def make(self, device: torch.device, cuda_graphs: str) -> TrainStep:
        cfg = Config(
            method=self.method,
            student=self.student,
            attack=AttackConfig(norm="l2", eps=0.5, step_size=0.4),
            engine=EngineConfig(
                cuda_graphs=cuda_graphs,
                grad_accum_steps=self.parts,
                kernels="on" if self.kernels else "off",
            ),
            optim=replace(CONFIG.optim, **{"clip_grad": 1.0, **self.optim}),
            ema=replace(CONFIG.ema, model_ema=True),
            **self.sections,
        )
        torch.manual_seed(0)
        method = METHODS[self.method]
        discretizer = None
        teacher = small.LinearTeacher()
        if self.timm_teacher or method.linear_probe:
            teacher = timm_teacher(precision=cfg.precision, img_size=SIDE, num_classes=C)
            teacher.image_size = SIDE
        teacher = teacher.to(device)
        if method.linear_probe:
            model = build_probe(teacher, "0" * 64, img_size=SIDE)
        else:
            model = build_student(cfg.student, C, SIDE, len(method.image_kinds))
            discretizer = small.discretizer(device, cfg.precision)
        model = model.to(device)
        if cfg.precision.channels_last:
            model = model.to(memory_format=torch.channels_last)
        update = Update(model, cfg, device)
        if self.num_processes:
            update.num_processes = self.num_processes
        return make_step(cfg, model, teacher, discretizer, update)

    def batch(self, number: int) -> Batch:
        """Return the batch of a step: another one every time."""
        g = torch.Generator().manual_seed(100 + number)
        pairs = B // 2
        kind = torch.randint(0, 3, (pairs,), generator=g)
        corner = torch.randint(0, 8, (2, pairs), generator=g)
        box = torch.stack([corner[0], corner[0] + 6, corner[1], corner[1] + 7], dim=1)
        lam = torch.where(kind == 2, 1 - 42 / SIDE**2, torch.rand(pairs, generator=g))
        lam = torch.where(kind == 0, 1.0, lam)
        confidence = torch.rand(B, generator=g)
        if number in self.bad_steps:
            kind[-1] = 1
            lam[-1] = float("nan")
            confidence[-1] = float("nan")

        def images() -> Tensor:
            nhwc = torch.randint(0, 256, (B, SIDE, SIDE, 3), generator=g, dtype=torch.uint8)
            return nhwc.permute(0, 3, 1, 2)

        more: dict[str, Tensor] = {}
        if self.images:
            more["dad_outputs"] = torch.randn(B, C, generator=g).half()
            more["dad_kept"] = (torch.rand(B, generator=g) > 0.4).float()
        if self.images == "codes":
            shape = B, packed_bytes(SIDE * SIDE // 4, 5)
            more["dad_codes"] = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        elif self.images:
            more["dad_images"] = images()
        if self.outputs:
            more["clean_outputs"] = torch.randn(B, C, generator=g).half()
        if METHODS[self.method].linear_probe:
            more["pseudo_labels"] = torch.randint(0, C, (B,), generator=g)
            more["confidence"] = confidence
        if self.features:
            more["features"] = torch.randn(B, 32, generator=g)
        labels = torch.randint(0, C, (B,), generator=g)
        if "data" in self.sections:
            labels = torch.where(torch.rand(B, generator=g) < 0.5, labels, UNLABELLED)
        return Batch(
            images=images(),
            labels=labels,
            samples=torch.arange(B) + number,
            seeds=torch.arange(B) * 977 + 31 * number,
            mix_kind=kind.repeat_interleave(2),
            mix_lam=lam.repeat_interleave(2),
            mix_box=torch.where((kind == 2)[:, None], box, 0).repeat_interleave(2, dim=0),
            epoch=number // 3,
            step=number,
            replaced=(),
            **more,
        )

    def batches(self, steps: int) -> Iterable[Batch]:
        return map(self.batch, range(steps))


def train(
    step: TrainStep, batches: Iterable[Batch], before: Callable[[int], object] = lambda _: None
) -> list[dict[str, Tensor]]:
    """Make a step with each batch. Returns the scalars of each step, then the state at the end.

    before: called with the number of each step.
    """
    torch.manual_seed(1)
    history = []
    for number, batch in enumerate(batches):
        before(number)
        scalars = run(step, batch, number, 1e-3 / (number + 1))
        history.append({name: value.clone() for name, value in scalars.items()})
    return [*history, state_of(step)]


def state_of(step: TrainStep) -> dict[str, Tensor]:
    """Return copies of all that the steps changed, by name."""
    learner = learner_of(step)
    update = learner.update
    assert update.ema is not None
    state = {f"student.{k}": v for k, v in learner.student.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in update.ema.module.state_dict().items()}
    for number, entry in update.optimizer.state_dict()["state"].items():
        tensors = {k: v for k, v in entry.items() if isinstance(v, Tensor)}
        state |= {f"optimizer.{number}.{k}": v for k, v in tensors.items()}
    state["loss_sum"] = update.loss_sum
    state["bad_in_a_row"] = update.bad_in_a_row
    state |= {f"scaler.{k}": torch.tensor(float(v)) for k, v in update.scaler.state_dict().items()}
    if step.device.type == "cpu":
        state["generator"] = torch.get_rng_state()
    return {name: value.detach().clone() for name, value in state.items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """True for the same bits, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def differences(
    a: list[dict[str, Tensor]],
    b: list[dict[str, Tensor]],
    same: Callable[[Tensor, Tensor], bool] = same_bytes,
) -> list[str]:
    """Compare two results of `train`. Returns the first step that differs, and the names in it."""
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        assert one.keys() == other.keys()
        names = [name for name in one if not same(one[name], other[name])]
        if names:
            return [f"step {number}" if number < len(a) - 1 else "state", *names]
    return []


JOINT = LossConfig(form="joint")
# What presets run, and one of each kind of batch.
CASES = {
    "ce": Case("ce"),
    "kd": Case("kd", BATCH_NORM),
    "aug-only": Case("aug-only"),
    "dat": Case("dat", parts=2),
    "dad": Case("dad", BATCH_NORM, parts=2),
    "dat+dad": Case("dat+dad"),
    "rslad": Case("rslad", BATCH_NORM, parts=2),
    "dist": Case("ard", parts=2, sections={"loss": LossConfig(distance="dist")}, kernels=True),
    "extra": Case(kernels=True, sections={"data": DataConfig(extra_data="a folder")}),
    "sgd": Case("kd", BATCH_NORM, optim={"opt": "sgd"}),
    "nan-first": Case("kd", bad_steps=(0, 1)),
    "nan-later": Case("kd", BATCH_NORM, parts=2, bad_steps=(2, 4)),
    "bf16": Case(sections={"precision": BF16}, timm_teacher=True),
    "fp16": Case("kd", BATCH_NORM, parts=2, sections={"precision": FP16}, bad_steps=(1, 4)),
    "kernels": Case(kernels=True, sections={"precision": BF16}),
    "channels-last": Case(
        student=BATCH_NORM, sections={"precision": replace(BF16, channels_last=True)}
    ),
    "stored-images": Case(sections={"store": STORE}, images="images"),
    "stored-codes": Case(
        student=BATCH_NORM, sections={"store": MIXED_STORE}, images="codes", outputs=True
    ),
    "joint": Case(
        sections={"store": STORE, "loss": JOINT, "precision": BF16},
        kernels=True,
        images="codes",
    ),
    "joint-outputs": Case(
        student=BATCH_NORM, sections={"store": STORE, "loss": JOINT}, images="images", outputs=True
    ),
    "shared-gradients": Case("kd", BATCH_NORM, parts=2, num_processes=2),
    "lp-clip": Case("lp-clip"),
    "lp-clip-features": Case("lp-clip", parts=2, features=True, bad_steps=(4,)),
    "lp-clip-true": Case("lp-clip", sections={"lp_clip": LpClipConfig(labels="true")}),
}
# Each method with both kinds of students, micro-batches, optimizers and precisions.
MATRIX = {
    f"{method}-{name}-{parts}": Case(method, student, parts)
    for method in METHOD_NAMES
    for name, student in STUDENTS.items()
    for parts in (1, 2)
}
for _method in METHOD_NAMES:
    _how = {"method": _method, "student": BATCH_NORM, "parts": 2, "bad_steps": (0, 4)}
    MATRIX[f"{_method}-adam"] = Case(**_how, optim={"opt": "adam"})
    MATRIX[f"{_method}-momentum"] = Case(_method, optim={"opt": "momentum"}, bad_steps=(4,))
    MATRIX[f"{_method}-bf16"] = Case(**_how, sections={"precision": BF16}, timm_teacher=True)
    MATRIX[f"{_method}-fp16"] = Case(**_how, sections={"precision": FP16}, timm_teacher=True)
    MATRIX[f"{_method}-shared"] = Case(**_how, num_processes=2)
for _images in ("images", "codes"):
    for _outputs in (False, True):
        _how = {"student": BATCH_NORM, "parts": 2, "images": _images, "outputs": _outputs}
        _name = f"{_images}-{'outputs' if _outputs else 'teacher'}"
        MATRIX[f"stored-{_name}"] = Case(**_how, sections={"store": STORE})
        MATRIX[f"joint-{_name}"] = Case(**_how, sections={"store": STORE, "loss": JOINT})
for _bn in ("joint", "split", "aux"):
    MATRIX[f"bn-{_bn}"] = Case("dat+dad", replace(BATCH_NORM, bn=_bn), parts=2)
for _labels in ("pseudo", "true"):
    for _threshold in (0.0, 0.5):
        _probe = LpClipConfig(labels=_labels, threshold=_threshold)
        MATRIX[f"lp-clip-{_labels}-{_threshold}"] = Case("lp-clip", sections={"lp_clip": _probe})
