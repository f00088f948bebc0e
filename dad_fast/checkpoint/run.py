"""State of a training run that checkpoints save and restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dad_fast.config.schema import Config


class TrainRun(Protocol):
    """Interface of a run to `save` and `restore`. The trainer implements it.

    Objects of the engine are typed as Any: this room does not import the engine.
    """

    cfg: Config
    output: Path
    parts: Any  # Components: data, models, stores, hashes
    update: Any  # Update: optimizer, scaler, EMA
    loader: Any
    monitor: Any  # Monitor: meter, advice, unreadable files
    clock: Any
    log: Any
    checkpoints: Any
    next_step: int
    best_top1: float
    best_epoch: float
    validation_due: bool
    worst_streak: Tensor
    shared_by: int  # the most runs that it shared its batches with, itself included
    notes: list[str]

    def model_file(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return tensors and metadata of `model.safetensors`."""
        ...
