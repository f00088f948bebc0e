"""Settings of the attack, the losses and LP-CLIP. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dad_fast.config.setting import NOT_NEGATIVE, POSITIVE, PROBABILITY, setting


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    norm: Literal["l2", "linf"] = setting("l2", "norm of the budget", "--attack-norm")
    eps: float = setting(
        0.1,
        "budget, in [0,1] pixels: L2 over the whole image, or L-infinity; auto: one that the "
        "discretizer shows",
        "--attack-eps",
        rule=NOT_NEGATIVE,
        auto=True,
    )
    step_size: float = setting(
        0.1,
        "length of a step, in the same norm; auto: the budget",
        "--attack-step-size",
        rule=NOT_NEGATIVE,
        auto=True,
    )
    steps: int = setting(1, "gradient steps", "--attack-steps", rule=NOT_NEGATIVE)
    random_start: float = setting(
        0.8,
        "probability, per sample, of starting at a random point of norm eps",
        "--attack-random-start",
        rule=PROBABILITY,
    )
    order: Literal["paper", "authors"] = setting(
        "paper",
        "paper: Q(x+d); authors: Q(Q(x)+d), with Q after every step: a VQGAN pass for x and for each "
        "step",
        "--attack-order",
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    ce: float = setting(1.0, "weight of CE(student(x), y)", "--ce-weight", rule=NOT_NEGATIVE)
    kd: float = setting(
        0.5, "weight of D(student(x), teacher(x)), D = --distance", "--kd-weight", rule=NOT_NEGATIVE
    )
    dad: float = setting(
        0.5,
        "weight of D(student(Q(x')), teacher(Q(x'))), x' attacks the teacher",
        "--dad-weight",
        rule=NOT_NEGATIVE,
    )
    ard: float = setting(
        0.5,
        "weight of D(student(Q(x')), teacher(x)), x' attacks the teacher (ard, rslad)",
        "--ard-weight",
        rule=NOT_NEGATIVE,
    )
    dat: float = setting(
        1.0,
        "weight of CE(student(Q(x'')), y), x'' attacks the student (dat)",
        "--dat-weight",
        rule=NOT_NEGATIVE,
    )
    aug: float = setting(
        1.0,
        "weight of CE(student(Q(x')), y), hard labels on the teacher's images (aug-only)",
        "--aug-weight",
        rule=NOT_NEGATIVE,
    )
    distance: str = setting(
        "kl",
        "distance D of student and teacher: kl (T^2 KL), l2 (of logits) or dist (correlation)",
        "--distance",
    )
    temperature: float = setting(4.0, "distillation temperature T", "--temperature", rule=POSITIVE)
    filter: bool = setting(
        True, "count an adversarial image only where the teacher still predicts y", "--filter"
    )
    form: Literal["paper", "joint"] = setting(
        "paper",
        "joint: ce CE + kd D over clean and stored images as one batch, mixed with each "
        "other (dad)",
        "--loss-form",
    )


@dataclass(frozen=True, kw_only=True)
class LpClipConfig:
    labels: Literal["pseudo", "true"] = setting(
        "pseudo",
        "pseudo: the teacher's predictions on the weak view; true: the data's labels, a "
        "supervised probe",
        "--lp-labels",
    )
    weight: Literal["confidence", "none"] = setting(
        "confidence", "weight of a pseudo-label: its confidence, or 1", "--lp-weight"
    )
    threshold: float = setting(
        0.0,
        "count a pseudo-label only where the teacher's confidence is at least this",
        "--lp-threshold",
        rule=PROBABILITY,
    )
    init: Literal["zeros", "zero-shot"] = setting(
        "zeros", "the linear layer at the start: zeros, or the teacher's own head", "--lp-init"
    )
    views: int = setting(
        0,
        "strong views per image, drawn once, whose features are kept in memory; 0 = new ones each "
        "epoch",
        "--lp-views",
        rule=NOT_NEGATIVE,
    )
