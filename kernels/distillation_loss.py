"""`distillation_loss`: cross-entropy and distillation of the same logits, in one pass forward and
one backward.

    CE = - sum_c y_c log softmax(s)_c                     y: labels or probabilities, smoothed: y (1
                                                          - a) + a / C
    KD = T^2 sum_c p_c (log p_c - log softmax(s / T)_c)   p = softmax(t / T)
    both: times a weight per sample, summed, divided by the batch size

student s, teacher t: [B, C] in float32, float16 or bfloat16; all arithmetic is float32 in log-space
(float64 in float64, on a CPU).
Gradient, by sample:  w/B (g_ce (softmax(s) sum(y) - y) + g_kd T (softmax(s/T) - p)).
Kept for backward: the inputs and six float32 a row.
Bytes: s, t and y are read once by each pass and the gradient is written once, 22 a logit for a
bfloat16 student, a float32 teacher and probabilities; the plain form in eager mode is about 25
operations of 4 to 16 bytes a logit each.

The plain functions below are the definition. For a loss the forward kernel visits a row twice, the
second time from the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns kept for backward: the largest s and t/T, log of the sum of exp(s - max), the same of s/T
# and t/T, sum of the targets.
MAX_S, MAX_T, LOG_S, LOG_ST, LOG_TT, MASS = range(6)


def soft_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """CE of logits [B, C] against labels int64 [B] or probabilities [B, C], times weight [B]; mean
    over the batch size.
    """
    log_probs = F.log_softmax(_at_least_float32(logits), dim=-1)
    if targets.dim() == 1:
        losses = -log_probs.gather(1, targets[:, None]).squeeze(1)
    else:
        losses = -(targets * log_probs).sum(dim=-1)
    return _mean(losses, weight)


def distillation(
    student: Tensor, teacher: Tensor, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch size; logits [B,
    C], weight [B].
    """
    student_log_probs = F.log_softmax(_at_least_float32(student) / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(_at_least_float32(teacher) / temperature, dim=-1)
    losses = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(
        dim=-1
    )
    return temperature**2 * _mean(losses, weight)


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing of probabilities [B, C]."""
    return targets * (1.0 - smoothing) + smoothing / targets.shape[-1] if smoothing else targets


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def _mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        # `where` rather than a product: a filtered sample with an infinite loss must count as 0,
        # not NaN.
        losses = (losses * weight).where(weight != 0, 0.0)
    return losses.sum() / losses.shape[0]


def _soft(targets: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Probabilities [B, C] of labels or probabilities, smoothed."""
    return smooth(
        F.one_hot(targets, num_classes).float() if targets.dim() == 1 else targets, smoothing
    )


def reference(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Return the op's results by the plain functions: (CE, KD) [2], and the statistics for backward
    [B, 6].
    """
    s = _at_least_float32(student)
    parts, kept = s.new_zeros(2), s.new_zeros(len(s), 6)
    kept[:, MAX_S] = s.amax(dim=1)
    kept[:, LOG_S] = torch.logsumexp(s - s.amax(dim=1, keepdim=True), dim=1)
    if targets is not None:
        hard = targets.dim() == 1 and not smoothing
        parts[0] = soft_cross_entropy(
            s, targets if hard else _soft(targets, s.shape[1], smoothing), weight
        )
        kept[:, MASS] = 1.0 if hard else _soft(targets, s.shape[1], smoothing).sum(dim=1)
    if teacher is not None:
        t = _at_least_float32(teacher)
        parts[1] = distillation(s, t, temperature, weight)
        kept[:, MAX_T] = (t / temperature).amax(dim=1)
        kept[:, LOG_ST] = torch.logsumexp(
            (s / temperature) - (s / temperature).amax(dim=1, keepdim=True), dim=1
        )
        kept[:, LOG_TT] = torch.logsumexp(
            (t / temperature) - (t / temperature).amax(dim=1, keepdim=True), dim=1
        )
    return parts, kept


def reference_backward(
    grad: Tensor,
    kept: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> Tensor:
    """Return the gradient of grad[0] CE + grad[1] KD in the student's logits."""
    s, (max_s, max_t, log_s, log_st, log_tt, mass) = (
        _at_least_float32(student),
        kept[:, :, None].unbind(1),
    )
    gradient = torch.zeros_like(s)
    if targets is not None:
        gradient += grad[0] * (
            (s - max_s - log_s).exp() * mass - _soft(targets, s.shape[1], smoothing)
        )
    if teacher is not None:
        t = _at_least_float32(teacher)
        probs = (
            (s / temperature - max_s / temperature - log_st).exp(),
            (t / temperature - max_t - log_tt).exp(),
        )
        gradient += grad[1] * temperature * (probs[0] - probs[1])
    if weight is not None:
        gradient = (gradient * weight[:, None]).where(weight[:, None] != 0, 0.0)
    return (gradient / len(s)).to(student.dtype)


@torch.library.custom_op("dad_fast::distillation_loss", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    return reference(student, teacher, targets, weight, temperature, smoothing)


@_forward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from dad_fast.kernels.distillation_loss_triton import launch

    return launch(*args)


@_forward.register_fake
def _(student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty(2, dtype=dtype), student.new_empty((student.shape[0], 6), dtype=dtype)


@torch.library.custom_op("dad_fast::distillation_loss_backward", mutates_args=())
def _backward(
    grad: Tensor,
    kept: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> Tensor:
    return reference_backward(grad, kept, student, teacher, targets, weight, temperature, smoothing)


@_backward.register_kernel("cuda")
def _(*args: Any) -> Tensor:
    from dad_fast.kernels.distillation_loss_triton import launch_backward

    return launch_backward(*args)


@_backward.register_fake
def _(grad: Tensor, kept: Tensor, student: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:4])
    ctx.settings = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(CE, KD), two scalars in float32 (see the top of this file); Triton on CUDA, the plain form
    elsewhere.

    student: [B, C], B >= 1, C >= 2, float32, float16 or bfloat16 (float64 on a CPU). teacher: [B,
    C] in any of these, or None: KD is 0. targets: labels int64 [B] in [0, C), probabilities [B, C]
    in float32, or None: CE is 0. weight: float32 [B], or None for 1; a sample of weight 0 counts as
    0, also with infinite logits. Only the student gets gradients, in its dtype. Raises ValueError
    for shapes that do not fit and a temperature that is not above 0.
    """
    if student.ndim != 2 or (teacher is not None and teacher.shape != student.shape):
        raise ValueError(
            f"student and teacher logits [B, C] are needed, not {list(student.shape)} and {_shape(teacher)}"
        )
    if targets is not None and targets.shape not in (student.shape, student.shape[:1]):
        raise ValueError(
            f"targets must be labels [B] or probabilities [B, C], not {_shape(targets)}"
        )
    if weight is not None and weight.shape != student.shape[:1]:
        raise ValueError(f"weight must be [B], not {_shape(weight)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    fixed = [None if tensor is None else tensor.detach() for tensor in (teacher, targets, weight)]
    parts, _ = _forward(student, *fixed, float(temperature), float(smoothing))
    ce, kd = parts.unbind()
    return ce, kd


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
