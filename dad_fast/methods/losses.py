"""The losses: one definition for every method (arXiv 2311.01441, eq. 8; weights as in the authors' code of August 2023).

    KD(s, t) = T^2 KL(softmax(t / T) || softmax(s / T))
    dad      = ce CE(s(x), y) + kd KD(s(x), t(x)) + dad KD(s(Q(x')), t(Q(x')))     x' attacks the teacher t
    dat      = ce CE(s(x), y) + dat CE(s(Q(x'')), y)                               x'' attacks the student s
    aug-only = ce CE(s(x), y) + aug CE(s(Q(x')), y)
    joint    = ce CE(s(z), y) + kd KD(s(z), t(z))     z: clean and stored images as one batch, mixed with each other

Every term is a mean over the batch size, filtered samples counting as 0: a filter that rejects most images weakens its term
instead of amplifying the few that are left. All arithmetic is float32 in log-space (float64 stays float64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dad_fast.config.schema import LossConfig, Method
from dad_fast.kernels.distillation_loss import (
    distillation,
    distillation_loss,
    smooth,
    soft_cross_entropy,
)

__all__ = [
    "TERMS",
    "Logits",
    "distillation",
    "joint_objective",
    "keep_mask",
    "mixed_outputs",
    "objective",
    "smooth",
    "soft_cross_entropy",
]

# The terms of each method, in the order in which they are added.
TERMS: dict[Method, tuple[str, ...]] = {
    "ce": ("ce",),
    "kd": ("ce", "kd"),
    "aug-only": ("ce", "aug"),
    "dat": ("ce", "dat"),
    "dad": ("ce", "kd", "dad"),
    "dat+dad": ("ce", "kd", "dad", "dat"),
}

# What each term compares: the student's logits with the targets (CE), or with a teacher's logits (KD); and whether the filter counts.
COMPARES = {
    "ce": ("student_clean", "", False),
    "kd": ("student_clean", "teacher_clean", False),
    "dad": ("student_dad", "teacher_dad", True),
    "aug": ("student_dad", "", True),
    "dat": ("student_dat", "", False),
}


@dataclass(frozen=True)
class Logits:
    """What the models said, each [B, C]: on clean images, on Q(x') (x' attacks the teacher) and on Q(x'') (the student)."""

    student_clean: Tensor
    student_dad: Tensor | None = None
    student_dat: Tensor | None = None
    teacher_clean: Tensor | None = None
    teacher_dad: Tensor | None = None


def keep_mask(teacher_dad: Tensor, labels: Tensor, second_labels: Tensor | None = None) -> Tensor:
    """The filter phi(Q(x')) = y as 0 or 1, float32 [B]; where two images were mixed either label will do."""
    said = teacher_dad.argmax(dim=-1)
    kept = said == labels
    if second_labels is not None:
        kept = kept | (said == second_labels)
    return kept.float()


def objective(
    method: Method,
    weights: LossConfig,
    logits: Logits,
    targets: Tensor,
    keep: Tensor | None,
    dad_targets: Tensor | None = None,
    *,
    fused: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its unweighted parts.

    targets: what CE uses, probabilities [B, C] (mixed and smoothed); dad_targets: the same for Q(x') where that is mixed otherwise, as
    stored images are. keep: filter [B] for the terms on Q(x'), or None to count all.
    fused: one kernel for all terms of the same student's logits, where there is one (CUDA; float32 arithmetic).
    """
    of_logits = {
        "student_clean": targets,
        "student_dat": targets,
        "student_dad": targets if dad_targets is None else dad_targets,
    }
    parts = (_parts_fused if fused else _parts)(
        TERMS[method], weights.temperature, logits, of_logits, keep
    )
    total = sum(
        (getattr(weights, name) * part for name, part in parts.items()), start=targets.new_zeros(())
    )
    return total, parts


def joint_objective(
    weights: LossConfig,
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    keep: Tensor | None,
    *,
    fused: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The form of the authors' code for stored images, 0.75 CE + 4 KL there (ce = 0.75, kd = 0.25 at T = 4): the loss and its parts.

    student, teacher, targets: [2B, C], of clean and adversarial images that were mixed across the two halves. keep: [2B], 0 for what shows
    any of an adversarial image that the filter rejects, since its label may be wrong; or None to count all. Means are over all 2B.
    """
    if fused:
        ce, kd = distillation_loss(student, teacher, targets, keep, temperature=weights.temperature)
    else:
        ce, kd = (
            soft_cross_entropy(student, targets, keep),
            distillation(student, teacher, weights.temperature, keep),
        )
    return weights.ce * ce + weights.kd * kd, {"ce": ce, "kd": kd}


def mixed_outputs(own: Tensor, others: Tensor, lam: Tensor, temperature: float) -> Tensor:
    """What stands for a teacher's logits on mixed pixels where only those on the unmixed images are known: an approximation.

    own, others: logits [B, C] of an image and of its partner; lam: [B], the share of the own one. Returns float32 [B, C], whose softmax at
    `temperature` is lam softmax(own / T) + (1 - lam) softmax(others / T).
    """
    share = lam.float()[:, None]
    of_own = (own.float() / temperature).log_softmax(dim=-1) + share.log()
    return temperature * torch.logaddexp(
        of_own, (others.float() / temperature).log_softmax(dim=-1) + torch.log1p(-share)
    )


def _parts(
    terms: tuple[str, ...],
    temperature: float,
    logits: Logits,
    targets: dict[str, Tensor],
    keep: Tensor | None,
) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for name in terms:
        of_student, of_teacher, filtered = COMPARES[name]
        student, weight = _given(logits, of_student), keep if filtered else None
        if of_teacher:
            parts[name] = distillation(student, _given(logits, of_teacher), temperature, weight)
        else:
            parts[name] = soft_cross_entropy(student, targets[of_student], weight)
    return parts


def _parts_fused(
    terms: tuple[str, ...],
    temperature: float,
    logits: Logits,
    targets: dict[str, Tensor],
    keep: Tensor | None,
) -> dict[str, Tensor]:
    """The same, with all terms on the same student's logits in one call; no method has two of a kind on them."""
    groups: dict[str, list[str]] = {}
    for name in terms:
        groups.setdefault(COMPARES[name][0], []).append(name)
    parts: dict[str, Tensor] = {}
    for of_student, names in groups.items():
        of_teacher = "".join(COMPARES[name][1] for name in names)
        ce, kd = distillation_loss(
            _given(logits, of_student),
            _given(logits, of_teacher) if of_teacher else None,
            targets[of_student] if any(not COMPARES[name][1] for name in names) else None,
            keep if any(COMPARES[name][2] for name in names) else None,
            temperature=temperature,
        )
        parts |= {name: kd if COMPARES[name][1] else ce for name in names}
    return {name: parts[name] for name in terms}


def _given(logits: Logits, name: str) -> Tensor:
    found: Tensor | None = getattr(logits, name)
    assert found is not None, "the step computes every logit that the method's terms use"
    return found
