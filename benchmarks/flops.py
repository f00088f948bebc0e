"""FLOP of the stages and steps of a workload, counted by torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dad_fast.data.loaders.loader import Batch
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.methods.attack import cross_entropy_direction
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher


class Flops:
    """FLOP per image of each stage, counted by torch in the plain forms; attention counts as two
    matrix products.
    """

    def __init__(self, student: Student, teacher: Teacher, vqgan: VQGAN, batch: Batch) -> None:
        few = 2
        pixels = batch.images[:few].float() / 255.0

        def gradient(model: Callable[[Tensor], Tensor]) -> Callable[[], object]:
            def run() -> object:
                # torch's counter fails if a module's input is a leaf, hence the product.
                x = pixels.clone().requires_grad_(True) * 1.0
                logits = model(x)
                direction = cross_entropy_direction(logits, batch.labels[:few])
                return torch.autograd.grad(logits, x, direction)

            return run

        with torch.no_grad():
            codes = vqgan.codes(pixels)
        counted: dict[str, Callable[[], object]] = {
            "teacher": lambda: teacher(pixels),
            "teacher_gradient": gradient(teacher),
            "student_gradient": gradient(student.eval().requires_grad_(False)),
            "encode": lambda: vqgan.encode(pixels),
            "decode": lambda: vqgan.decode(codes),
        }
        self.of = {name: count(run) / few for name, run in counted.items()}
        student.train().requires_grad_(True)
        self.of["student"] = count(lambda: student(pixels).sum().backward()) / few

    def of_step(self, method: str, order: str = "paper") -> float:
        """Return the FLOP per image of a training step of `method`."""
        f = self.of
        passes = 2 if order == "authors" else 1
        vqgan = passes * (f["encode"] + f["decode"])
        return {
            "ce": f["student"],
            "kd": f["student"] + f["teacher"],
            "dat": 2 * f["student"] + f["student_gradient"] + vqgan,
            "dad": 2 * f["student"] + 2 * f["teacher"] + f["teacher_gradient"] + vqgan,
        }[method]


def count(function: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    # Other attention kernels are not counted on every device.
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return int(counter.get_total_flops())
