"""The parts of a step on one batch, against a whole step of plain distillation in the same interleaved run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.timm_kd import kd_baseline
from benchmarks.workload import make_workload
from dad_fast.engine.generator import AttackGenerator
from dad_fast.methods.attack import cross_entropy_direction


@pytest.mark.parametrize("batch_size", [32, 256])
def test_stages(bench: Bench, batch_size: int) -> None:
    if bench.device.type == "cpu" and batch_size > 32:
        batch_size = 100  # the demo's own
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

    learner.update.begin(10, 0.0)  # a learning rate of 0: the weights stay, the work is the same
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


def test_ceiling(bench: Bench) -> None:
    """What a plain matrix product reaches here: the yardstick of the TFLOP/s column."""
    side, dtype = (8192, torch.bfloat16) if bench.device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    name = f"{side} x {side}, {str(dtype).removeprefix('torch.')}"
    bench.compare(
        "matrix product",
        {name: lambda: a @ b},
        baseline=name,
        work=1,
        unit="product",
        flops={name: 2 * side**3},
        seconds=5,
        config={"side": side, "dtype": str(dtype).removeprefix("torch.")},
    )
