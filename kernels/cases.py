"""Test cases of the kernels: each against torch, on the shapes of a run.

A kernel passes if no value's error against float64 is more than twice the largest of torch in the
kernel's dtypes, plus one unit in the last place of the largest value, plus the rounding of some
float32 arithmetic: torch's own error of a single sum may be small by chance. Codes must be equal. Cases call the launchers themselves, so
that they also run on a CPU under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dad_fast.kernels import distillation_loss, pgd_update
from dad_fast.kernels.group_norm_silu import NormMap
from dad_fast.kernels.nearest_code.torch_search import search_torch
from dad_fast.kernels.pack_codes import pack_torch

if TYPE_CHECKING:
    from dad_fast.kernels.nearest_code import CodebookSearch

FLOAT32_ULPS = 32
BATCH = 2
ROWS = 8  # of the loss
LATENTS = 1024

PGD_UPDATE = "pgd_update"
DISTILLATION_LOSS = "distillation_loss"
GROUP_NORM_SILU = "group_norm_silu"
PACK_CODES = "pack_codes"
CODEBOOK_SEARCH = "codebook_search"
NAMES = (PGD_UPDATE, DISTILLATION_LOSS, GROUP_NORM_SILU, PACK_CODES, CODEBOOK_SEARCH)

Compute = Callable[[], Sequence[Tensor]]


class Case(NamedTuple):
    """One kernel on one shape."""

    kernel: str  # one of NAMES
    shape: str
    run: Compute  # the kernel
    plain: Compute  # torch, in the kernel's dtypes
    exact: Compute  # float64


def problem(case: Case) -> str:
    """Run a case; return "" if the kernel is as exact as torch, else one line. Synchronizes."""
    try:
        found = list(case.run())
        if found[0].is_cuda:
            torch.cuda.synchronize(found[0].device)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__} on {case.shape}: {lines[-1][:200]}"
    for ours, plain, exact in zip(found, case.plain(), case.exact(), strict=True):
        if ours.shape != exact.shape or ours.dtype != plain.dtype:
            return f"returns {list(ours.shape)} {ours.dtype} on {case.shape}"
        allowed = 2 * (plain.double() - exact.double()).abs().max()
        if ours.is_floating_point():
            arithmetic = FLOAT32_ULPS * torch.finfo(torch.float32).eps
            allowed += (torch.finfo(ours.dtype).eps + arithmetic) * exact.abs().max()
        apart = (ours.double() - exact.double()).abs()
        # NaN is not within any bound.
        if not bool((apart <= allowed).all()):
            return f"error {apart.max():.1e} on {case.shape}, {allowed:.1e} allowed"
    return ""


def pgd_update_case(
    device: torch.device, side: int, norm: str, eps: float, step_size: float
) -> Case:
    """The attack's update on images of `side` pixels; the gradient is float32."""

    def run() -> Sequence[Tensor]:
        from dad_fast.kernels.pgd_update_triton import launch

        return launch(pixels, delta, gradient, norm, eps, step_size)

    draw = _draws(device)
    pixels, noise, gradient = draw(3, BATCH, 3, side, side).unbind()
    pixels = pixels.sigmoid()
    delta = pgd_update.project(eps * noise, pixels, norm, eps)
    gradient = gradient * 1e-3
    settings = norm, eps, step_size
    doubles = pixels.double(), delta.double(), gradient.double()
    return Case(
        PGD_UPDATE,
        f"{norm} updates of {side} px",
        run,
        lambda: pgd_update.reference(pixels, delta, gradient, *settings),
        lambda: pgd_update.reference(*doubles, *settings),
    )


def distillation_loss_cases(
    device: torch.device, num_classes: int, dtype: torch.dtype, temperature: float
) -> list[Case]:
    """Losses and gradient of a student in `dtype`: CE and KD of all samples, and filtered KD."""
    draw = _draws(device)
    student = 3 * draw(ROWS, num_classes)
    teacher, labels = 3 * draw(2, ROWS, num_classes).unbind()[0], draw(ROWS, num_classes)
    targets = labels.softmax(dim=1)
    keep = torch.arange(ROWS, device=device).remainder(2).float()
    student = student.to(dtype)
    grad = torch.tensor([1.0, 0.5], device=device)

    def case(name: str, *others: Tensor | None) -> Case:
        def run() -> Sequence[Tensor]:
            from dad_fast.kernels.distillation_loss_triton import launch, launch_backward

            inputs = (student, *others, temperature, 0.0)
            parts, kept = launch(*inputs)
            return parts, launch_backward(grad, kept, *inputs)

        def reference(inputs: list[Tensor | None]) -> Sequence[Tensor]:
            arguments = (*inputs, temperature, 0.0)
            parts, kept = distillation_loss.reference(*arguments)  # type: ignore[arg-type]
            scales = grad.to(parts.dtype)
            return parts, distillation_loss.reference_backward(scales, kept, *arguments)  # type: ignore[arg-type]

        plain = [student, *others]
        double = [None if tensor is None else tensor.double() for tensor in plain]
        shape = f"{name} of {num_classes} classes"
        return Case(
            DISTILLATION_LOSS, shape, run, lambda: reference(plain), lambda: reference(double)
        )

    return [case("CE and KD", teacher, targets, None), case("filtered KD", teacher, None, keep)]


def group_norm_silu_case(device: torch.device, shape: NormMap) -> Case:
    """Group norm and SiLU of NHWC maps, with the bias and residual before it."""
    draw = _draws(device)
    size = BATCH, shape.height, shape.width, shape.channels
    x, residual = ((1 + draw(*size)).to(shape.dtype).permute(0, 3, 1, 2) for _ in range(2))
    weight, bias, channel_bias = draw(3, shape.channels).unbind()
    terms = [x]
    if shape.has_bias:
        channel_bias = channel_bias.to(shape.dtype)
        terms.append(channel_bias.view(1, -1, 1, 1))
    if shape.has_residual:
        terms.append(residual)

    def run() -> Sequence[Tensor]:
        from dad_fast.kernels.group_norm_silu_triton import launch

        y, total = launch(
            x,
            residual if shape.has_residual else None,
            weight,
            bias,
            shape.groups,
            shape.eps,
            shape.silu,
            channel_bias if shape.has_bias else None,
        )
        return (y, total) if shape.has_residual else (y,)

    def reference(dtype: torch.dtype) -> Sequence[Tensor]:
        total = sum((term.to(dtype) for term in terms[1:]), start=terms[0].to(dtype))
        affine = weight.to(dtype), bias.to(dtype)
        y = F.group_norm(total, shape.groups, *affine, shape.eps)
        y = F.silu(y) if shape.silu else y
        return (y, total) if shape.has_residual else (y,)

    return Case(
        GROUP_NORM_SILU,
        f"maps of {shape.channels}x{shape.height}x{shape.width}, {str(shape.dtype)[6:]}",
        run,
        lambda: reference(shape.dtype),
        lambda: reference(torch.float64),
    )


def pack_codes_case(device: torch.device, bits: int, length: int) -> Case:
    """Packing and unpacking the codes of an image."""

    def run() -> Sequence[Tensor]:
        from dad_fast.kernels import pack_codes_triton

        packed = pack_codes_triton.pack(codes, bits, None)
        return packed, pack_codes_triton.unpack(packed, bits, length)

    def exact() -> Sequence[Tensor]:
        return pack_torch(codes, bits), codes

    codes = torch.randint(1 << bits, (BATCH, length), generator=torch.Generator().manual_seed(0))
    codes = codes.to(device)
    return Case(PACK_CODES, f"{length} codes of {bits} bits", run, exact, exact)


def codebook_search_case(search: CodebookSearch) -> Case:
    """The prepared search, with latents near the midpoints of pairs of codes: the hard case."""
    codebook = search.codebook
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(len(codebook), (LATENTS, 2), generator=generator).to(codebook.device)
    noise = torch.randn(LATENTS, codebook.shape[1], generator=generator).to(codebook.device)
    latents = codebook[pairs].mean(dim=1) + 1e-4 * codebook.std(correction=0) * noise

    def exact() -> Sequence[Tensor]:
        return (search_torch(latents, codebook),)

    shape = f"{len(codebook)} codes of {codebook.shape[1]} dimensions by {search.backend}"
    return Case(CODEBOOK_SEARCH, shape, lambda: (search.search(latents),), exact, exact)


def _draws(device: torch.device) -> Callable[..., Tensor]:
    """Normal numbers on the device, the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)
