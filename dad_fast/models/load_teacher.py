"""Load a teacher by name."""

from __future__ import annotations

from pathlib import Path

import torch

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.errors import UsageError
from dad_fast.models.registry import TEACHERS, check_teacher_name, is_registered
from dad_fast.models.teacher import Teacher, TeacherContext

EXAMPLES = (
    "open_clip:ARCH/TAG, open_clip:ARCH@FILE, timm:NAME[@FILE], hf-hub:REPO, embedded:digits, a run's "
    "folder"
)


def load_teacher(
    cfg: TeacherConfig,
    classes: ClassMap,
    precision: PrecisionConfig,
    device: torch.device,
    shapes_only: bool = False,
) -> Teacher:
    """Load the teacher `cfg.name` on `device`, with one output for each of `classes`.

    The name is open_clip:ARCH/TAG, open_clip:ARCH@FILE, hf-hub:REPO, timm:NAME, timm:NAME@FILE,
    embedded:NAME, any other teacher of the registry, RUN (the folder of a run of this project), or
    FILE: safetensors with the architecture in its metadata, as RUN/model.safetensors.
    shapes_only: build the architecture without reading or downloading weights, where the name tells
    it.

    Raises UsageError for any other name, EnvironmentProblem for weights that are not available,
    DataError for a file or a class list that does not fit.
    """
    check_teacher_name(cfg.name)
    context = TeacherContext(
        cfg=cfg, classes=classes, precision=precision, device=device, shapes_only=shapes_only
    )
    if is_registered(cfg.name):
        name, argument = TEACHERS.split(cfg.name)
    elif cfg.name and (Path(cfg.name).suffix or Path(cfg.name).exists()):
        name, argument = "file", cfg.name
    else:
        raise UsageError(f"--teacher {cfg.name!r}: no such file or run; write one, or {EXAMPLES}")
    return TEACHERS[name](argument, context).to(device)
