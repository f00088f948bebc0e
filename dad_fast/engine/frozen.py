"""Load teacher and discretizer, hash their weights, and apply their optimizations."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from dad_fast.config.schema import MODEL_SAVINGS, VQGAN_SAVINGS, Config
from dad_fast.data.classes import ClassMap
from dad_fast.discretizers.base import Discretizer
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.fused_layers import VQGANOptimizations
from dad_fast.engine.choices import is_convolutional
from dad_fast.errors import UsageError
from dad_fast.methods.registry import METHODS
from dad_fast.models.ensemble import Ensemble
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.optimizations import Optimizations, optimize_teacher
from dad_fast.models.teacher import Teacher
from dad_fast.models.weights.files import fingerprint

log = logging.getLogger("dad_fast.engine")


class FrozenTeacher(NamedTuple):
    """A teacher with the hash of its weights as loaded, head included.

    savings: optimization -> "" where it is on, else the reason why it is off.
    encoder_fingerprint: hash of the image encoder alone; prompts and heads do not change it.
    member_fingerprints: of an ensemble, the hash of each member as "teacher 1", "teacher 2", …,
    without names, which may be paths; empty for one teacher.
    """

    model: Teacher
    fingerprint: str
    savings: dict[str, str]
    encoder_fingerprint: str
    member_fingerprints: dict[str, str | None]


class FrozenDiscretizer(NamedTuple):
    """A discretizer with the hash of its weights; None for one without trained weights."""

    model: Discretizer
    fingerprint: str | None


def model_optimizations(cfg: Config) -> Optimizations:
    """Return the optimizations of teacher and student that the run asks for."""
    return Optimizations(**{name: _wanted(cfg, name) for name in MODEL_SAVINGS})


def vqgan_optimizations(cfg: Config) -> VQGANOptimizations:
    """Return the optimizations of a VQGAN that the run asks for."""
    return VQGANOptimizations(**{name: _wanted(cfg, f"vqgan_{name}") for name in VQGAN_SAVINGS})


def teacher(cfg: Config, classes: ClassMap, device: torch.device) -> FrozenTeacher:
    """Load the teacher of a run, in NHWC if it is convolutional and `precision.channels_last` is on.

    cfg: with booleans in place of switches (`choices.settle`).
    Raises UsageError for a linear probe on an ensemble, and the errors of `load_teacher`.
    """
    model = load_teacher(
        cfg.teacher,
        classes,
        cfg.precision,
        device,
        temperature=cfg.loss.temperature,
        needs_head=needs_head(cfg),
    )
    if METHODS[cfg.method].linear_probe and isinstance(model, Ensemble):
        raise UsageError(
            f"--teacher {model.name}: --method {cfg.method} trains on one encoder; name one of them"
        )
    # Hashed before the optimizations, which change weights.
    digest = fingerprint(model)
    encoder_digest = fingerprint(model.encoder)
    by_member: dict[str, str | None] = {}
    if isinstance(model, Ensemble):
        by_member = {
            f"teacher {number}": fingerprint(member)
            for number, member in enumerate(model.members, start=1)
        }
    applied = optimize_teacher(model, model_optimizations(cfg))
    for member in model.members:
        if cfg.precision.channels_last and is_convolutional(member):
            member.to(memory_format=torch.channels_last)
    return FrozenTeacher(model, digest, applied, encoder_digest, by_member)


def needs_head(cfg: Config) -> bool:
    """True if the run uses the teacher's logits; a linear probe with true labels does not."""
    is_supervised = METHODS[cfg.method].linear_probe and cfg.lp_clip.labels == "true"
    return not is_supervised


def discretizer(cfg: Config, device: torch.device) -> FrozenDiscretizer:
    """Load the discretizer of a run, without the kernels that need a self-test."""
    optimizations = vqgan_optimizations(cfg)
    micro_batch = cfg.engine.vqgan_micro_batch
    model = load_discretizer(
        cfg.discretizer.name, cfg.precision, device, optimizations, micro_batch=micro_batch
    )
    return FrozenDiscretizer(model, model.fingerprint())


def _wanted(cfg: Config, name: str) -> bool:
    named = cfg.engine.savings
    return "none" not in named and ("all" in named or name in named)
