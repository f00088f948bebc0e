"""`dad-fast doctor --numerics`: compare this machine's arithmetic with the definitions.

A few seconds a device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dad_fast.config.schema import AttackConfig, PrecisionConfig
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN
from dad_fast.engine.self_test import faults, step_cases, unavailable
from dad_fast.kernels import nearest_code
from dad_fast.kernels.cases import Case
from dad_fast.methods.attack import PGD
from dad_fast.tools.doctor.row import Row

TOLERANCE = 1e-5  # of a pixel in [0, 1]: float32 against float64


def rows() -> Iterator[Row]:
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        yield search_row(torch.device(device))
        yield attack_row(torch.device(device))
        if not unavailable(torch.device(device)):
            yield from kernel_rows(device, published_cases(torch.device(device)))


def kernel_rows(device: str, tests: Iterator[Case]) -> Iterator[Row]:
    """Run the self-test of a run's start; one row per kernel."""
    for name, why in faults(tests).items():
        if why:
            fix = "report it, with this output; runs use torch in its place"
            yield Row(name, "wrong", f"{device}: {why}", fix)
        else:
            yield Row(name, "ok", f"{device}: as exact as torch")


def published_cases(device: torch.device) -> Iterator[Case]:
    """Yield the cases of a run at 224 px with 1000 classes and a published VQGAN, f8 or f16."""
    yield from step_cases(device, 224, 1000, AttackConfig(), torch.bfloat16, 4.0)
    for name in ("f8-16384", "f16-16384"):
        with device:
            vqgan = VQGAN(PRESETS[name])
        yield from VQGANDiscretizer(vqgan, PrecisionConfig(amp=True)).kernel_cases(224)


def search_row(device: torch.device) -> Row:
    """Compare the codebook search with the float64 argmin, on a codebook where float32 distances
    fail.

    Clusters far from the origin are the hard case: |z|^2 - 2ze + |e|^2 loses the deciding digits.
    """
    latents, codebook = hard_problem()
    expected = torch.stack(
        [(row - codebook.double()).square().sum(1).argmin() for row in latents.double()]
    )
    found = nearest_code(latents.to(device), codebook.to(device)).cpu()
    # The usual shortcut in float32, [N, K].
    scores = codebook.square().sum(1) - 2 * latents @ codebook.T
    wrong = (found != expected).sum().item()
    shortcut = (scores.argmin(1) != expected).sum().item()
    detail = f"{device}: {wrong} of {len(latents)} codes differ from float64 (float32's shortcut: {shortcut})"
    return Row(
        "codebook search",
        "wrong" if wrong else "ok",
        detail,
        "report it, with this output" if wrong else "",
        required=True,
    )


def hard_problem() -> tuple[Tensor, Tensor]:
    """Return latents [2048, 4] near midpoints of codes [1024, 4] in tight clusters around (30, 30,
    30, 30).
    """
    generator = torch.Generator().manual_seed(0)
    centres = 30 + torch.randn(16, 1, 4, generator=generator)
    codebook = (centres + 1e-2 * torch.randn(16, 64, 4, generator=generator)).reshape(-1, 4)
    pairs = torch.randint(len(codebook), (2048, 2), generator=generator)
    return codebook[pairs].mean(1) + 1e-4 * torch.randn(2048, 4, generator=generator), codebook


def attack_row(device: torch.device) -> Row:
    """Compare PGD on a linear teacher with its closed form: with two classes the gradient direction
    is constant.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = 0.3 + 0.4 * torch.rand(8, 3, 16, 16, generator=generator)
    # Small weights give logits of a few units, so the softmax does not round to 1.
    weight = 0.05 * torch.randn(2, pixels[0].numel(), generator=generator)
    labels, keys = torch.arange(8) % 2, torch.arange(8)
    # Away from the label, [B, 768].
    sign = (1 - 2 * labels)[:, None].double()
    direction = (weight[1] - weight[0]).double()[None] * sign
    teacher = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(pixels[0].numel(), 2, bias=False)
    ).to(device)
    teacher[1].weight = torch.nn.Parameter(weight.to(device))
    errors = {}
    for norm, eps, step in (("l2", 0.1, 0.04), ("linf", 4 / 255, 1.5 / 255)):
        unit = direction / direction.norm(dim=1, keepdim=True) if norm == "l2" else direction.sign()
        # Three steps of more than eps / 3 end on the ball.
        expected = pixels.double() + eps * unit.view_as(pixels)
        attack = PGD(norm=norm, eps=eps, step_size=step, steps=3, random_start=0.0)  # type: ignore[arg-type]
        found = attack(teacher, pixels.to(device), labels.to(device), keys.to(device))
        errors[norm] = (found.cpu().double() - expected).abs().max().item()
    detail = f"{device}: largest error against the closed form {errors['l2']:.1e} (L2), {errors['linf']:.1e} (L-infinity)"
    wrong = max(errors.values()) > TOLERANCE
    return Row(
        "attack",
        "wrong" if wrong else "ok",
        detail,
        "report it, with this output" if wrong else "",
        required=True,
    )
