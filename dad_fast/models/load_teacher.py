"""Load a teacher by name, or an ensemble of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dad_fast.config.schema import LossConfig, PrecisionConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.errors import UsageError
from dad_fast.models.ensemble import Ensemble
from dad_fast.models.registry import FORMS, TEACHERS, is_registered, members
from dad_fast.models.teacher import Teacher, TeacherContext


def load_teacher(
    cfg: TeacherConfig,
    classes: ClassMap,
    precision: PrecisionConfig,
    device: torch.device,
    shapes_only: bool = False,
    *,
    temperature: float = LossConfig.temperature,
    needs_head: bool = True,
) -> Teacher:
    """Load the teacher `cfg.name` on `device`, with one output for each of `classes`.

    The name is open_clip:ARCH/TAG, open_clip:ARCH@FILE, hf-hub:REPO, timm:NAME, timm:NAME@FILE,
    timm:hf-hub:REPO, embedded:NAME, any other teacher of the registry, RUN (the folder of a run of this project), or
    FILE: safetensors with the architecture in its metadata, as RUN/model.safetensors. Several of
    them joined by + are an ensemble.
    shapes_only: build the architecture without reading or downloading weights, where the name tells
    it. temperature: at which an ensemble averages probabilities. needs_head: False takes an encoder
    without a class head, too.

    Raises UsageError for any other name, EnvironmentProblem for weights that are not available,
    DataError for a file or a class list that does not fit.
    """
    context = TeacherContext(
        cfg=cfg, classes=classes, precision=precision, device=device, shapes_only=shapes_only
    )
    loaded = [_load(replace(context, cfg=member)) for member in members(cfg)]
    if needs_head or len(loaded) > 1:
        for teacher in loaded:
            teacher.check_head()
    if len(loaded) == 1:
        return loaded[0]
    ensemble = Ensemble(
        loaded,
        name=cfg.name,
        weights=cfg.weights or (1.0,) * len(loaded),
        average=cfg.average,
        temperature=temperature,
    )
    return ensemble.to(device)


def _load(context: TeacherContext) -> Teacher:
    text = context.cfg.name
    if is_registered(text):
        name, argument = TEACHERS.split(text)
    elif text and (Path(text).suffix or Path(text).exists()):
        name, argument = "file", text
    else:
        forms = ", ".join(form.text for forms in FORMS.values() for form in forms)
        raise UsageError(f"--teacher {text!r}: no such file or run; write one of {forms}")
    return TEACHERS[name](argument, context).to(context.device)
