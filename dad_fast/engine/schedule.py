"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from dad_fast.config.schema import OptimConfig, ScheduleConfig


def total_epochs(schedule: ScheduleConfig) -> float:
    """Return the epochs of a whole run; the cool-down comes after `epochs`, as in timm."""
    return schedule.epochs + schedule.cooldown_epochs


def learning_rate(
    step: int, steps_per_epoch: int, optim: OptimConfig, schedule: ScheduleConfig
) -> float:
    """Return the learning rate: linear warm-up, cosine to min_lr at the end of `epochs`, then
    min_lr.

    step: from 0.
    """
    epoch = step / steps_per_epoch
    if epoch < schedule.warmup_epochs:
        return schedule.warmup_lr + (optim.lr - schedule.warmup_lr) * epoch / schedule.warmup_epochs
    if epoch >= schedule.epochs:
        return schedule.min_lr
    progress = (epoch - schedule.warmup_epochs) / (schedule.epochs - schedule.warmup_epochs)
    return schedule.min_lr + 0.5 * (optim.lr - schedule.min_lr) * (1 + math.cos(math.pi * progress))
