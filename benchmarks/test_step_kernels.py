"""Optimizations of the step outside the VQGAN (teacher, student, PGD update, loss), each against
its plain form.

Predictions are FLOP for models and bytes for the update, both counted before measuring.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import Bench
from benchmarks.workload import random_teacher
from dad_fast.config.schema import PrecisionConfig, StudentConfig
from dad_fast.kernels.distillation_loss import distillation, distillation_loss, soft_cross_entropy
from dad_fast.kernels.pgd_update import pgd_update, reference
from dad_fast.models.optimizations import PLAIN, Optimizations, optimize_student, optimize_teacher
from dad_fast.models.student import build_student

# Twelve blocks, so that the last block has the same share as in ViT-B.
TINY_VIT = {"embed_dim": 192, "depth": 12, "num_heads": 3}
MODELS = {  # student, teacher (of workload.TOWERS), batch
    "tiny": (("vit_base_patch16_224", TINY_VIT), "ViT-B-16 of width 192", 2),
    "base": (("vit_small_patch16_224", {}), "ViT-B-16", 128),
    "paper": (("vit_base_patch16_224", {}), "ViT-L-14", 256),
}
# An element; see pgd_update.py.
PIXEL_BYTES = {
    "plain": {"l2": 124, "linf": 80},
    "fused": {"l2": 28, "linf": 20},
}


def mixed(bench: Bench) -> bool:
    return bench.device.type == "cuda"


def flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def test_student(bench: Bench) -> None:
    """Forward and backward, with only the class token in the last block."""
    (name, kwargs), _, batch = MODELS[bench.size]
    pixels = torch.rand(batch, 3, 224, 224, device=bench.device)
    labels = torch.randint(0, 1000, (batch,), device=bench.device)
    functions: dict[str, Callable[[], object]] = {}
    for label, savings in (("plain", PLAIN), ("class token only", Optimizations())):
        torch.manual_seed(0)
        student = build_student(StudentConfig(name=name, model_kwargs=kwargs), 1000, 224).to(
            bench.device
        )
        assert not any(optimize_student(student, savings).values())
        functions[label] = _training(student, pixels, labels, mixed(bench))
        if bench.device.type == "cuda":
            functions[f"{label}, compiled"] = _training(
                torch.compile(student), pixels, labels, mixed(bench)
            )
    counted = {
        label: flops(function) / batch
        for label, function in functions.items()
        if "compiled" not in label
    }
    config = {"student": name, "kwargs": kwargs, "batch_size": batch, "amp": mixed(bench)}
    bench.compare(
        "student, forward + backward",
        functions,
        baseline="plain",
        work=batch,
        config=config,
        flops=counted,
    )


def _training(student: nn.Module, pixels: Tensor, labels: Tensor, amp: bool) -> Callable[[], None]:
    def step() -> None:
        student.zero_grad(set_to_none=True)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=amp):
            logits = student(pixels)
        F.cross_entropy(logits.float(), labels).backward()

    return step


@pytest.mark.parametrize("what", ["forward", "forward + input gradient"])
def test_teacher(bench: Bench, what: str) -> None:
    """Every optimization alone and all together: 16-bit compute on a GPU, float32 without casts on
    a CPU.
    """
    _, tower, batch = MODELS[bench.size]
    plain = random_teacher(tower, PrecisionConfig(amp=mixed(bench)), bench.device)
    pixels = torch.rand(batch, 3, 224, 224, device=bench.device)
    names = [saving for saving in vars(PLAIN) if saving != "cast_weights" or mixed(bench)]
    kinds = {
        "plain": PLAIN,
        **{
            saving: Optimizations(**{key: key == saving for key in vars(PLAIN)}) for saving in names
        },
        "all": Optimizations(),
    }
    functions: dict[str, Callable[[], object]] = {}
    for label, savings in kinds.items():
        teacher = copy.deepcopy(plain)
        refused = {name for name, why in optimize_teacher(teacher, savings).items() if why}
        assert refused <= {"cast_weights", "clip_attention"}
        functions[label] = _inference(teacher, pixels, what)
        if bench.device.type == "cuda" and label in ("plain", "all"):
            functions[f"{label}, compiled"] = _inference(torch.compile(teacher), pixels, what)
    counted = {label: flops(functions[label]) / batch for label in kinds}
    config = {"teacher": plain.name, "batch_size": batch, "amp": mixed(bench)}
    bench.compare(
        f"teacher, {what}", functions, baseline="plain", work=batch, config=config, flops=counted
    )


def _inference(teacher: nn.Module, pixels: Tensor, what: str) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return teacher(pixels)

    def gradient() -> Tensor:
        x = pixels.detach().requires_grad_(True)
        teacher(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    return forward if what == "forward" else gradient


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_update(bench: Bench, norm: str) -> None:
    batch = 16 if bench.size == "tiny" else 256
    pixels = torch.rand(batch, 3, 224, 224, device=bench.device)
    delta, gradient = (torch.randn_like(pixels) * 1e-3 for _ in range(2))
    args = (pixels, delta, gradient, norm, 0.1, 0.1)
    compiled = torch.compile(reference)
    functions: dict[str, Callable[[], object]] = {
        "plain": lambda: reference(*args),
        "torch.compile": lambda: compiled(*args),
    }
    predicted = {"torch.compile": PIXEL_BYTES["fused"][norm] / PIXEL_BYTES["plain"][norm]}
    if bench.device.type == "cuda":
        functions["triton"] = lambda: pgd_update(*args)
        predicted["triton"] = predicted["torch.compile"]
    notes = (
        {
            "torch.compile": "predicted by the fewest bytes; its L2 needs a pass for each of its three sums"
        }
        if norm == "l2"
        else {}
    )
    bench.compare(
        f"pgd update, {norm}",
        functions,
        baseline="plain",
        work=batch,
        predicted=predicted,
        notes=notes,
        config={"batch_size": batch},
        graph=True,
    )


@pytest.mark.parametrize("num_classes", [1000, 21843])
def test_distillation_loss(bench: Bench, num_classes: int) -> None:
    """CE and KD of the same logits, forward and backward, of a bfloat16 student on a GPU."""
    batch = 64 if bench.size == "tiny" else 256
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    student = (
        (3 * torch.randn(batch, num_classes, device=bench.device)).to(dtype).requires_grad_(True)
    )
    teacher = 3 * torch.randn(batch, num_classes, device=bench.device)
    targets = torch.rand(batch, num_classes, device=bench.device).softmax(1)

    def plain(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return soft_cross_entropy(student, targets) + 0.5 * distillation(student, teacher, 4.0)

    def fused(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        ce, kd = distillation_loss(student, teacher, targets, temperature=4.0)
        return ce + 0.5 * kd

    def run(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(student, teacher, targets), student)

    functions = {"plain": run(plain), "torch.compile": run(torch.compile(plain))}
    if bench.device.type == "cuda":
        functions["triton"] = run(fused)
    bench.compare(
        f"CE + KD, {num_classes} classes",
        functions,
        baseline="plain",
        work=batch,
        config={"batch_size": batch, "dtype": str(dtype)[6:]},
    )
