"""Losses of every method, computed from its terms (dad_fast/methods/registry.py).

    CE(s, y) = -sum y log softmax(s)
    KD(s, t) = T^2 KL(softmax(t / T) || softmax(s / T)), or another distance (methods/distances.py)
    dad      = ce CE(s(x), y) + kd KD(s(x), t(x)) + dad KD(s(Q(x')), t(Q(x')))     arXiv 2311.01441, eq. 8
    joint    = ce CE(s(z), y) + kd KD(s(z), t(z))     z: clean and stored images as one batch

Every term is a mean over the batch size, and filtered samples count as 0: a filter that rejects most images weakens its
term instead of amplifying the few that are left. All arithmetic is float32 in log-space (float64 stays float64).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dad_fast.config.schema import LossConfig
from dad_fast.kernels.distillation_loss import (
    distillation,
    distillation_loss,
    smooth,
    soft_cross_entropy,
)
from dad_fast.methods.registry import CE, KD, Images, MethodSpec, Target, Term, with_distance

__all__ = [
    "distillation",
    "joint_objective",
    "keep_mask",
    "mixed_outputs",
    "objective",
    "smooth",
    "soft_cross_entropy",
]

Logits = Mapping[Images, Tensor]  # float [B, C] on each kind of images
# Terms of the joint form, whose images are partly adversarial.
JOINT_FORM = (replace(CE, filtered=True), replace(KD, filtered=True))


def keep_mask(
    teacher_logits: Tensor, labels: Tensor, second_labels: Tensor | None = None
) -> Tensor:
    """Return the filter phi(Q(x')) = y as 0 or 1, float32 [B]; where two images were mixed either label counts.

    teacher_logits: [B, C] on adversarial images. labels, second_labels: int64 [B].
    """
    answers = teacher_logits.argmax(dim=-1)
    kept = answers == labels
    if second_labels is not None:
        kept = kept | (answers == second_labels)
    return kept.float()


def objective(
    method: MethodSpec,
    weights: LossConfig,
    student: Logits,
    teacher: Logits,
    targets: Logits,
    keep: Tensor | None,
    *,
    labelled: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, a scalar, and its unweighted terms by name.

    student, teacher: logits on the images that the terms use.
    targets: probabilities [B, C] for cross-entropy, mixed and smoothed, for each kind of images.
    keep: filter [B] for the terms that it applies to, or None to count all samples.
    labelled: [B], 0 for samples that count 0 in terms with labels, or None to count all.
    fused: one kernel for all terms on the same student's logits, where there is one (CUDA; float32 arithmetic).
    """
    terms = with_distance(method.terms, weights.distance)
    compute = _fused_terms if fused else _plain_terms
    counts = _Counts(keep, labelled)
    values = compute(terms, weights.temperature, student, teacher, targets, counts)
    zero = targets[Images.CLEAN].new_zeros(())
    weighted = (weight_of(term, weights) * values[term.name] for term in terms)
    return sum(weighted, start=zero), values


def weight_of(term: Term, weights: LossConfig) -> float:
    """Return the weight of a term: a number, or the value of its setting."""
    if isinstance(term.weight, str):
        return float(getattr(weights, term.weight.removeprefix("loss.")))
    return term.weight


def joint_objective(
    weights: LossConfig,
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    keep: Tensor | None,
    *,
    fused: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and its terms in the form of the authors' code for stored images.

    Theirs is 0.75 CE + 4 KL: ce = 0.75, kd = 0.25 at T = 4.

    student, teacher, targets: [2B, C], of clean and adversarial images that were mixed across the two halves. keep:
    [2B], 0 for images that show any of an adversarial image that the filter rejects, since its label may be wrong; or
    None to count all. Means are over all 2B.
    """
    kind, terms = Images.CLEAN, with_distance(JOINT_FORM, weights.distance)
    compute = _fused_terms if fused else _plain_terms
    models = {kind: student}, {kind: teacher}
    counts = _Counts(keep, None)
    values = compute(terms, weights.temperature, *models, {kind: targets}, counts)
    return weights.ce * values["ce"] + weights.kd * values["kd"], values


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


class _Counts:
    """Weights of the samples in the terms: of the filter and of labels, each [B] or None."""

    def __init__(self, keep: Tensor | None, labelled: Tensor | None) -> None:
        self.keep = keep
        self.labelled = labelled

    def kind(self, term: Term) -> tuple[bool, bool]:
        """Return which of the two apply to a term."""
        by_label = term.target == Target.LABELS and self.labelled is not None
        return term.filtered and self.keep is not None, by_label

    def of(self, term: Term) -> Tensor | None:
        """Return the weights of the samples in a term."""
        filtered, by_label = self.kind(term)
        if filtered and by_label:
            assert self.keep is not None and self.labelled is not None
            return self.keep * self.labelled
        return self.keep if filtered else self.labelled if by_label else None


def _plain_terms(
    terms: tuple[Term, ...],
    temperature: float,
    student: Logits,
    teacher: Logits,
    targets: Logits,
    counts: _Counts,
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for term in terms:
        logits = student[term.images]
        weight = counts.of(term)
        of_teacher = term.teacher_images
        reference = targets[term.images] if of_teacher is None else teacher[of_teacher]
        if term.loss:
            values[term.name] = _own_loss(term)(logits, reference, weight, temperature)
        elif of_teacher is not None:
            values[term.name] = distillation(logits, reference, temperature, weight)
        else:
            values[term.name] = soft_cross_entropy(logits, reference, weight)
    return values


def _fused_terms(
    terms: tuple[Term, ...],
    temperature: float,
    student: Logits,
    teacher: Logits,
    targets: Logits,
    counts: _Counts,
) -> dict[str, Tensor]:
    """Compute the same with one kernel for all terms on the same images that count the same samples; terms with a loss
    of their own stay plain."""
    own = tuple(term for term in terms if term.loss)
    values = _plain_terms(own, temperature, student, teacher, targets, counts)
    groups: dict[tuple[Images, tuple[bool, bool]], list[Term]] = {}
    for term in terms:
        if not term.loss:
            groups.setdefault((term.images, counts.kind(term)), []).append(term)
    for (images, _), group in groups.items():
        labels = [term for term in group if term.target == Target.LABELS]
        teachers = [term for term in group if term.target != Target.LABELS]
        if len(labels) > 1 or len(teachers) > 1:
            values |= _plain_terms(tuple(group), temperature, student, teacher, targets, counts)
            continue
        of_teacher = teachers[0].teacher_images if teachers else None
        ce, kd = distillation_loss(
            student[images],
            None if of_teacher is None else teacher[of_teacher],
            targets[images] if labels else None,
            counts.of(group[0]),
            temperature=temperature,
        )
        values |= {term.name: ce for term in labels} | {term.name: kd for term in teachers}
    return {term.name: values[term.name] for term in terms}


def _own_loss(term: Term) -> Any:
    module, _, name = term.loss.partition(":")
    return getattr(importlib.import_module(module), name)
