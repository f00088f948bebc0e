"""`distillation_loss` in Triton: formulas, shapes and bytes are in distillation_loss.py. Not yet
run on a GPU.

Forward is one program a row, which makes its sums in a fixed order; backward is elementwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 2048  # classes a program holds at once
# Registers a thread may use; 8 classes a thread need about 60. Without a limit, ptxas aims at an
# occupancy of its own choice and spills a register or two for it: which kernel it hits changes with
# the version of Triton.
MAX_REGISTERS = 128


@triton.jit
def _load_row(pointer, row, stride, column, mask, other: tl.constexpr):
    return tl.load(pointer + row.to(tl.int64) * stride + column, mask=mask, other=other).to(
        tl.float32
    )


@triton.jit
def _log_sum(largest, total, values):
    """(max, sum of exp(value - max)) with one more block of values, -inf where there are none.

    NaN and +inf end as NaN in the sum.
    """
    new = tl.maximum(largest, tl.max(values))
    shift = tl.where(new == float("-inf"), 0.0, new)  # only -inf so far
    return new, total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift))


@triton.jit
def _targets(targets_ptr, row, stride, column, mask, num_classes, LABELS: tl.constexpr, smoothing):
    """Probabilities of one block, smoothed; 0 outside of the row."""
    if LABELS:
        y = tl.where(column == tl.load(targets_ptr + row), 1.0, 0.0)
    else:
        y = _load_row(targets_ptr, row, stride, column, mask, 0.0)
    return tl.where(mask, y * (1.0 - smoothing) + smoothing / num_classes, 0.0)


@triton.jit
def _forward(
    student_ptr,  # [B, C]
    teacher_ptr,  # [B, C]
    targets_ptr,  # [B, C] probabilities or [B] labels
    weight_ptr,  # [B] float32
    losses_ptr,  # [2, B] float32, out: CE and KD, weighted
    kept_ptr,  # [B, 6] float32, out
    student_stride,
    teacher_stride,
    targets_stride,
    batch,
    num_classes,
    temperature,
    smoothing,
    TEACHER: tl.constexpr,
    TARGETS: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    max_s, total_s = float("-inf"), 0.0
    max_st, total_st = float("-inf"), 0.0  # of s / T
    max_tt, total_tt = float("-inf"), 0.0  # of t / T
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < num_classes
        s = _load_row(student_ptr, row, student_stride, column, mask, float("-inf"))
        max_s, total_s = _log_sum(max_s, total_s, s)
        if TEACHER:
            t = _load_row(teacher_ptr, row, teacher_stride, column, mask, float("-inf"))
            max_st, total_st = _log_sum(max_st, total_st, tl.div_rn(s, temperature))
            max_tt, total_tt = _log_sum(max_tt, total_tt, tl.div_rn(t, temperature))
    log_s, log_st, log_tt = tl.log(total_s), tl.log(total_st), tl.log(total_tt)

    # max and log of the sum stay separate, so that a small log-probability keeps its digits next to
    # a large logit.
    ce, kd, mass = 0.0, 0.0, 0.0
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < num_classes
        s = _load_row(student_ptr, row, student_stride, column, mask, 0.0)
        if TARGETS:
            y = _targets(
                targets_ptr, row, targets_stride, column, mask, num_classes, LABELS, smoothing
            )
            log_q = s - max_s - log_s
            # A product would make NaN of 0 times an infinite log-probability.
            if LABELS and not SMOOTH:
                ce -= tl.sum(tl.where(y > 0.0, log_q, 0.0))
            else:
                ce -= tl.sum(tl.where(mask, y * log_q, 0.0))
            mass += tl.sum(y)
        if TEACHER:
            t = _load_row(teacher_ptr, row, teacher_stride, column, mask, 0.0)
            log_q = tl.div_rn(s, temperature) - max_st - log_st
            log_p = tl.div_rn(t, temperature) - max_tt - log_tt
            kd += tl.sum(tl.where(mask, tl.exp(log_p) * (log_p - log_q), 0.0))
    kd = kd * temperature * temperature
    if WEIGHT:
        weight = tl.load(weight_ptr + row)
        # Not only a product: the loss may be infinite.
        ce = tl.where(weight == 0.0, 0.0, ce * weight)
        kd = tl.where(weight == 0.0, 0.0, kd * weight)
    tl.store(losses_ptr + row, ce)
    tl.store(losses_ptr + batch + row, kd)
    kept = kept_ptr + row.to(tl.int64) * 6
    tl.store(kept, max_s)
    tl.store(kept + 1, max_tt)
    tl.store(kept + 2, log_s)
    tl.store(kept + 3, log_st)
    tl.store(kept + 4, log_tt)
    tl.store(kept + 5, mass)


@triton.jit
def _backward(
    grad_ptr,  # [2] float32: of CE and KD
    kept_ptr,  # [B, 6] float32
    student_ptr,  # [B, C]
    teacher_ptr,  # [B, C]
    targets_ptr,  # [B, C] probabilities or [B] labels
    weight_ptr,  # [B] float32
    gradient_ptr,  # [B, C], out
    student_stride,
    teacher_stride,
    targets_stride,
    grad_stride,
    num_classes,
    per_sample,
    temperature,
    smoothing,
    TEACHER: tl.constexpr,
    TARGETS: tl.constexpr,
    LABELS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_classes
    kept = kept_ptr + row.to(tl.int64) * 6
    s = _load_row(student_ptr, row, student_stride, column, mask, 0.0)
    max_s = tl.load(kept)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if TARGETS:
        y = _targets(targets_ptr, row, targets_stride, column, mask, num_classes, LABELS, smoothing)
        probs = tl.exp(s - max_s - tl.load(kept + 2))
        gradient += tl.load(grad_ptr) * (probs * tl.load(kept + 5) - y)
    if TEACHER:
        t = _load_row(teacher_ptr, row, teacher_stride, column, mask, 0.0)
        probs = tl.exp(
            tl.div_rn(s, temperature) - tl.div_rn(max_s, temperature) - tl.load(kept + 3)
        )
        wanted = tl.exp(tl.div_rn(t, temperature) - tl.load(kept + 1) - tl.load(kept + 4))
        gradient += tl.load(grad_ptr + grad_stride) * temperature * (probs - wanted)
    if WEIGHT:
        weight = tl.load(weight_ptr + row)
        gradient = tl.where(weight == 0.0, 0.0, gradient * weight)
    out = gradient_ptr + row.to(tl.int64) * num_classes + column
    tl.store(out, gradient * per_sample, mask=mask)


def launch(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """As the op `dad_fast::distillation_loss`."""
    batch, num_classes = student.shape
    losses, kept = (
        student.new_empty((2, batch), dtype=torch.float32),
        student.new_empty((batch, 6), dtype=torch.float32),
    )
    student, teacher, targets, weight = (
        _rows(student),
        _rows(teacher),
        _rows(targets),
        _rows(weight),
    )
    block, num_warps = _meta(num_classes)
    with torch.cuda.device_of(student):
        _forward[(batch,)](
            *(
                student,
                _or(teacher, student),
                _or(targets, student),
                _or(weight, student),
                losses,
                kept,
            ),
            *(student.stride(0), _or(teacher, student).stride(0), _or(targets, student).stride(0)),
            *(batch, num_classes, temperature, smoothing),
            TEACHER=teacher is not None,
            TARGETS=targets is not None,
            LABELS=targets is not None and targets.ndim == 1,
            SMOOTH=smoothing > 0,
            WEIGHT=weight is not None,
            BLOCK=block,
            num_warps=num_warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return losses.sum(dim=1) / batch, kept


def launch_backward(
    grad: Tensor,
    kept: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> Tensor:
    """As the op `dad_fast::distillation_loss_backward`."""
    batch, num_classes = student.shape
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    student, teacher, targets, weight = (
        _rows(student),
        _rows(teacher),
        _rows(targets),
        _rows(weight),
    )
    block, num_warps = _meta(num_classes)
    with torch.cuda.device_of(student):
        _backward[(batch, triton.cdiv(num_classes, block))](
            *(
                grad,
                kept,
                student,
                _or(teacher, student),
                _or(targets, student),
                _or(weight, student),
                gradient,
            ),
            *(
                student.stride(0),
                _or(teacher, student).stride(0),
                _or(targets, student).stride(0),
                grad.stride(0),
            ),
            *(num_classes, 1.0 / batch, temperature, smoothing),
            TEACHER=teacher is not None,
            TARGETS=targets is not None,
            LABELS=targets is not None and targets.ndim == 1,
            WEIGHT=weight is not None,
            BLOCK=block,
            num_warps=num_warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return gradient


def report_launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """A bfloat16 student and a float32 teacher: CE and KD of mixed labels, CE of labels, KD with a
    filter.
    """
    for num_classes in (1000, 21843):
        empty = functools.partial(torch.empty, device="meta")
        student = empty(64, num_classes, dtype=torch.bfloat16)
        teacher, probabilities = empty(2, 64, num_classes).unbind()
        labels, weight = empty(64, dtype=torch.int64), empty(64)
        for name, losses, smoothing in (
            ("CE and KD", (teacher, probabilities, None), 0.0),
            ("CE of labels", (None, labels, None), 0.1),
            ("filtered KD", (teacher, None, weight), 0.0),
        ):
            inputs = (student, *losses, 4.0, smoothing)

            def run(inputs: tuple[Any, ...] = inputs) -> None:
                _, kept = launch(*inputs)
                launch_backward(torch.empty(2, device="meta"), kept, *inputs)

            yield f"distillation_loss: {name}, {num_classes} classes", run


def _meta(num_classes: int) -> tuple[int, int]:
    """(BLOCK, num_warps): a row at once up to MAX_BLOCK classes, 8 or more a thread."""
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(num_classes)))
    return block, max(1, min(8, block // 256))


def _rows(tensor: Tensor | None) -> Tensor | None:
    """With unit stride in the last dimension, copied where it has another."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer for an argument that the kernel then does not read."""
    return instead if tensor is None else tensor
