"""Settings that decide a run's generated batches; runs with equal ones can share them.

One loader and one Generator then serve several students (engine/step.py). Imports no torch.
"""

from __future__ import annotations

from typing import Any

from dad_fast.config.fields import get, settings
from dad_fast.config.schema import Config
from dad_fast.methods.registry import METHODS
from dad_fast.models.registry import teacher_settings

# Sections and settings of a learner, evaluation views among them: a batch does not depend on them.
_LEARNER = ("student", "optim", "ema", "schedule", "loss")
_LEARNER_SETTINGS = frozenset(
    {"augment.smoothing", "augment.crop_pct", "augment.interpolation", "precision.student"}
)
# Exceptions: the number of steps, and the form of the batch.
_BATCH_SETTINGS = frozenset({"schedule.epochs", "schedule.cooldown_epochs", "loss.form"})


def batch_settings(cfg: Config, *, any_size: bool = False) -> dict[str, Any]:
    """Return what the batches of a run depend on, by path; runs with equal ones can share them.

    any_size: the students' image sizes may differ: batches are made for the largest and resized for
        the others, whose results then differ from those of a run of their own. Otherwise students
        that decide their image size themselves are equal only to themselves.

    A linear probe shares none: its features belong to its own learner.
    """
    found = {path: get(cfg, path) for path in settings() if not _is_of_learner(path)}
    found["teacher"] = teacher_settings(cfg)
    if cfg.store.mix_outputs or cfg.loss.form == "joint":
        # Outputs are mixed at the temperature.
        found["loss.temperature"] = cfg.loss.temperature
    if cfg.store.dirs:
        # The filter is a part of what the stores add to a batch.
        found["loss.filter"] = cfg.loss.filter
    if not cfg.augment.img_size and not any_size:
        found |= {path: get(cfg, path) for path in ("student.name", "student.model_kwargs")}
    if METHODS[cfg.method].linear_probe:
        found["student"] = id(cfg)
    return found


def _is_of_learner(path: str) -> bool:
    if path in _BATCH_SETTINGS:
        return False
    return path in _LEARNER_SETTINGS or path.partition(".")[0] in _LEARNER
