"""The part of a training run that checkpoints save and restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dad_fast.config.schema import Config


class TrainRun(Protocol):
    """A run in progress, as `save` and `restore` see it. The trainer is one.

    The objects of the engine are typed loosely here: a checkpoint asks them for state and gives it back.
    """

    cfg: Config
    output: Path
    parts: Any  # Components: data, models, stores, hashes
    update: Any  # Update: optimizer, scaler, EMA
    loader: Any
    meter: Any
    clock: Any
    advice: Any
    log: Any
    writer: Any
    checkpoints: Any
    next_step: int
    best_top1: float
    validation_due: bool
    worst_streak: Tensor
    bad_images: set[str]
    notes: list[str]

    def gathered_bad_images(self) -> list[str]: ...

    def model_file(self) -> tuple[dict[str, Any], dict[str, str]]: ...
