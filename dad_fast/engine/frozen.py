"""Teacher and discretizer as a run uses them: loaded, named by a hash, and then freed of work that nobody needs."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from dad_fast.config.schema import MODEL_SAVINGS, VQGAN_SAVINGS, Config
from dad_fast.data.classes import ClassMap
from dad_fast.discretizers.base import Discretizer
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.fused_layers import VQGANOptimizations
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.optimizations import Optimizations, optimize_teacher
from dad_fast.models.teacher import Teacher
from dad_fast.models.weights.files import fingerprint

log = logging.getLogger("dad_fast.engine")


class FrozenTeacher(NamedTuple):
    model: Teacher
    fingerprint: str  # of the weights as they were loaded, head included
    savings: dict[str, str]  # saving -> "" where it is on, else why it is not
    encoder_fingerprint: str  # of the image encoder alone, which no prompt and no head changes


class FrozenDiscretizer(NamedTuple):
    model: Discretizer
    fingerprint: str | None  # None where nothing is trained


def model_optimizations(cfg: Config) -> Optimizations:
    """For teacher and student."""
    return Optimizations(**{name: _wanted(cfg, name) for name in MODEL_SAVINGS})


def teacher(cfg: Config, classes: ClassMap, device: torch.device) -> FrozenTeacher:
    model = load_teacher(cfg.teacher, classes, cfg.precision, device)
    digest, of_encoder = fingerprint(model), fingerprint(model.encoder)
    return FrozenTeacher(
        model, digest, optimize_teacher(model, model_optimizations(cfg)), of_encoder
    )


def discretizer(cfg: Config, device: torch.device) -> FrozenDiscretizer:
    savings = {name: _wanted(cfg, f"vqgan_{name}") for name in VQGAN_SAVINGS}
    kernel = cfg.engine.step_kernels and device.type == "cuda"
    model = load_discretizer(
        cfg.discretizer.name,
        cfg.precision,
        device,
        VQGANOptimizations(**savings, norm_kernel=kernel),
    )
    return FrozenDiscretizer(model, model.fingerprint())


def _wanted(cfg: Config, name: str) -> bool:
    return "none" not in cfg.engine.savings and (
        "all" in cfg.engine.savings or name in cfg.engine.savings
    )
