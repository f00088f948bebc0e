"""The losses: one definition for every method (arXiv 2311.01441, eq. 8; weights as in the authors' code of August 2023).

    KD(s, t) = T^2 KL(softmax(t / T) || softmax(s / T))
    dad      = ce CE(s(x), y) + kd KD(s(x), t(x)) + dad KD(s(Q(x')), t(Q(x')))     x' attacks the teacher t
    dat      = ce CE(s(x), y) + dat CE(s(Q(x'')), y)                               x'' attacks the student s
    aug-only = ce CE(s(x), y) + aug CE(s(Q(x')), y)

Every term is a mean over the batch size, filtered samples counting as 0: a filter that rejects most images weakens its term
instead of amplifying the few that are left. All arithmetic is float32 in log-space (float64 stays float64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dad_fast.config.schema import LossConfig, Method

# The terms of each method, in the order in which they are added.
TERMS: dict[Method, tuple[str, ...]] = {
    "ce": ("ce",),
    "kd": ("ce", "kd"),
    "aug-only": ("ce", "aug"),
    "dat": ("ce", "dat"),
    "dad": ("ce", "kd", "dad"),
    "dat+dad": ("ce", "kd", "dad", "dat"),
}


@dataclass(frozen=True)
class Logits:
    """What the models said, each [B, C]: on clean images, on Q(x') (x' attacks the teacher) and on Q(x'') (the student)."""

    student_clean: Tensor
    student_dad: Tensor | None = None
    student_dat: Tensor | None = None
    teacher_clean: Tensor | None = None
    teacher_dad: Tensor | None = None


def soft_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """CE of logits [B, C] against labels int64 [B] or probabilities [B, C], times weight [B]; mean over the batch size."""
    log_probs = F.log_softmax(_at_least_float32(logits), dim=-1)
    if targets.dim() == 1:
        losses = -log_probs.gather(1, targets[:, None]).squeeze(1)
    else:
        losses = -(targets * log_probs).sum(dim=-1)
    return _mean(losses, weight)


def distillation(student: Tensor, teacher: Tensor, temperature: float, weight: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch size; logits [B, C], weight [B]."""
    student_log_probs = F.log_softmax(_at_least_float32(student) / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(_at_least_float32(teacher) / temperature, dim=-1)
    losses = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * _mean(losses, weight)


def keep_mask(teacher_dad: Tensor, labels: Tensor, second_labels: Tensor | None = None) -> Tensor:
    """The filter phi(Q(x')) = y as 0 or 1, float32 [B]; where two images were mixed either label will do."""
    said = teacher_dad.argmax(dim=-1)
    kept = said == labels
    if second_labels is not None:
        kept = kept | (said == second_labels)
    return kept.float()


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing of probabilities [B, C]."""
    return targets * (1.0 - smoothing) + smoothing / targets.shape[-1] if smoothing else targets


def objective(
    method: Method, weights: LossConfig, logits: Logits, targets: Tensor, keep: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its unweighted parts.

    targets: what CE uses, probabilities [B, C] (mixed and smoothed). keep: filter [B] for the terms on Q(x'), or None to count all.
    """

    def term(name: str) -> Tensor:
        if name == "ce":
            return soft_cross_entropy(logits.student_clean, targets)
        if name == "kd":
            return distillation(logits.student_clean, _given(logits.teacher_clean), weights.temperature)
        if name == "dad":
            return distillation(_given(logits.student_dad), _given(logits.teacher_dad), weights.temperature, keep)
        if name == "aug":
            return soft_cross_entropy(_given(logits.student_dad), targets, keep)
        return soft_cross_entropy(_given(logits.student_dat), targets)

    parts = {name: term(name) for name in TERMS[method]}
    total = sum((getattr(weights, name) * part for name, part in parts.items()), start=targets.new_zeros(()))
    return total, parts


def _given(logits: Tensor | None) -> Tensor:
    assert logits is not None, "the step computes every logit that the method's terms use"
    return logits


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def _mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        # `where`, not a product: a filtered sample whose loss is infinite must count as 0, not as NaN.
        losses = (losses * weight).where(weight != 0, 0.0)
    return losses.sum() / losses.shape[0]
