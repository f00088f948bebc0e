"""The parts of a step on one batch, against a whole step of plain distillation in the same
interleaved run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.timm_kd import kd_baseline
from benchmarks.workload import batch_size_for, make_workload
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.fused_layers import Attention
from dad_fast.engine.generator import AttackGenerator
from dad_fast.kernels.wide_attention import WAYS
from dad_fast.methods.attack import cross_entropy_direction


@pytest.mark.parametrize("batch_size", [32, 256])
def test_stages(bench: Bench, batch_size: int) -> None:
    batch_size = batch_size_for(bench.device, bench.size, batch_size)
    work = make_workload(bench.size, bench.device, batch_size)
    flops = work.flops
    step = work.step(work.with_method("dad"))
    (learner,) = step.learners
    generator = step.generator
    assert isinstance(generator, AttackGenerator)
    x, y, _, _ = generator.mixed(work.batch)
    teacher, vqgan, student = work.teacher, work.discretizer, learner.student.train()
    with torch.no_grad():
        latents = vqgan.encode(x)
        codes = vqgan.vqgan.lookup(latents)

    def input_gradient() -> Tensor:
        pixels = x.detach().requires_grad_(True)
        logits = teacher(pixels)
        return torch.autograd.grad(logits, pixels, cross_entropy_direction(logits, y))[0]

    def teacher_forward() -> Tensor:
        with torch.no_grad():
            return teacher(x)

    def attack_arithmetic() -> (
        Tensor
    ):  # start, direction and projection around a model that costs nothing
        return generator.attack(lambda pixels: pixels.mean((2, 3)) @ weight, x, y, work.batch.seeds)

    weight = torch.rand(3, work.num_classes, device=work.device)

    def student_step() -> None:
        for parameter in student.parameters():
            parameter.grad = None
        with learner.autocast():
            logits = student(x)
        logits.float().sum().backward()

    learner.update.begin(10, 0.0)  # learning rate 0 keeps the weights; the work is the same
    student_step()  # `apply` finds gradients, also in its warm-up

    baseline, kd_step = kd_baseline(work)
    functions: dict[str, Callable[[], object]] = {
        baseline: kd_step,
        "teacher forward": teacher_forward,
        "teacher forward + input gradient": input_gradient,
        "attack arithmetic": attack_arithmetic,
        "encode": lambda: vqgan.encode(x),
        "lookup": lambda: vqgan.vqgan.lookup(latents),
        "decode": lambda: vqgan.decode(codes),
        "student forward + backward": student_step,
        "optimizer, EMA": learner.update.apply,
    }
    counted = {
        baseline: flops.of_step("kd"),
        "teacher forward": flops.of["teacher"],
        "teacher forward + input gradient": flops.of["teacher_gradient"],
        "encode": flops.of["encode"],
        "decode": flops.of["decode"],
        "student forward + backward": flops.of["student"],
    }
    bench.compare(
        f"batch {batch_size}",
        functions,
        baseline=baseline,
        work=batch_size,
        config=work.describe(),
        flops=counted,
        energy=True,
        seconds=15,
    )


# Norm, attention, cuDNN's choice of algorithm by timing
VARIANTS = {
    "torch's norm, sdpa": (False, "sdpa", False),
    "norm kernel, sdpa": (True, "sdpa", False),
    "norm kernel, sdpa on copies": (True, "sdpa on copies", False),
    "norm kernel, bmm": (True, "bmm", False),
    "norm kernel, bmm, cudnn.benchmark": (True, "bmm", True),
}


def sdpa_on_copies(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend after copies of q, k and v, which come strided from NHWC maps."""
    return WAYS["sdpa"](q.contiguous(), k.contiguous(), v.contiguous(), scale)


@pytest.mark.parametrize("batch_size", [32, 256])
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_variants(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str, batch_size: int
) -> None:
    """Encode and decode with each kind of group norm and of attention."""
    batch_size = batch_size_for(bench.device, bench.size, batch_size)
    work = make_workload(bench.size, bench.device, batch_size)
    vqgan, precision = work.discretizer, work.cfg.precision
    x = work.batch.images.float() / 255.0
    with torch.no_grad():
        inputs = x if what == "encode" else vqgan.vqgan.lookup(vqgan.encode(x))

    def variant(norm_kernel: bool, attention: str, benchmark: bool) -> Callable[[], Tensor]:
        switches = dataclasses.replace(vqgan.optimizations, norm_kernel=norm_kernel)
        form = VQGANDiscretizer(vqgan.vqgan, precision, optimizations=switches)
        form.fit_float16(x[:8])
        for module in form.fused.modules():
            if isinstance(module, Attention):
                module.attend = {**WAYS, "sdpa on copies": sdpa_on_copies}[attention]
        half = getattr(form, what)

        def run() -> Tensor:
            torch.backends.cudnn.benchmark = benchmark
            return half(inputs)

        return run

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # as before, afterwards
    bench.compare(
        f"batch {batch_size}, {what}",
        {name: variant(*switches) for name, switches in VARIANTS.items()},
        baseline=next(iter(VARIANTS)),
        work=batch_size,
        config=work.describe(),
        flops=dict.fromkeys(VARIANTS, work.flops.of[what]),
        seconds=10,
    )
