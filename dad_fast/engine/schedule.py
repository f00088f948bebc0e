"""Length of a run, and its learning rate as a function of the step."""

from __future__ import annotations

import math

from dad_fast.config.schema import Config, OptimConfig, ScheduleConfig


def total_epochs(schedule: ScheduleConfig) -> float:
    """Return the epochs of a whole run; the cool-down comes after `epochs`, as in timm."""
    return schedule.epochs + schedule.cooldown_epochs


def total_steps(cfg: Config, steps_per_epoch: int) -> int:
    """Return the steps of a whole run."""
    steps = round(total_epochs(cfg.schedule) * steps_per_epoch)
    return min(steps, cfg.max_steps) if cfg.max_steps else steps


def learning_rate(
    step: int, steps_per_epoch: int, optim: OptimConfig, schedule: ScheduleConfig
) -> float:
    """Return the learning rate: linear warm-up, cosine to min_lr at the end of `epochs`, then
    min_lr.

    step: from 0. With `warmup_prefix` the cosine starts at lr where the warm-up ends. Without, it
    starts at step 0 and the warm-up hides its first part, so the rate drops there (timm's default).
    """
    epoch = step / steps_per_epoch
    if epoch < schedule.warmup_epochs:
        return schedule.warmup_lr + (optim.lr - schedule.warmup_lr) * epoch / schedule.warmup_epochs
    if epoch >= schedule.epochs:
        return schedule.min_lr
    start = schedule.warmup_epochs if schedule.warmup_prefix else 0.0
    progress = (epoch - start) / (schedule.epochs - start)
    return schedule.min_lr + 0.5 * (optim.lr - schedule.min_lr) * (1 + math.cos(math.pi * progress))
