"""Length of a run, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

from dad_fast.config.schema import Config, OptimConfig, ScheduleConfig
from dad_fast.errors import UsageError


def total_epochs(schedule: ScheduleConfig) -> float:
    """Return the epochs of a whole run; the cool-down comes after `epochs`, as in timm."""
    return schedule.epochs + schedule.cooldown_epochs


def total_steps(cfg: Config, steps_per_epoch: int) -> int:
    """Return the steps of a whole run."""
    steps = round(total_epochs(cfg.schedule) * steps_per_epoch)
    return min(steps, cfg.max_steps) if cfg.max_steps else steps


def make_schedule(
    steps_per_epoch: int, optim: OptimConfig, schedule: ScheduleConfig
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, from 0: `learning_rate`, or timm's.

    timm's schedules hold no state, so a resumed run has the same learning rates. Raises UsageError
    for arguments that timm refuses.
    """
    if schedule.sched == "cosine" and not schedule.sched_kwargs:
        return partial(
            learning_rate, steps_per_epoch=steps_per_epoch, optim=optim, schedule=schedule
        )
    # timm sets the rate of an optimizer, here of one that trains nothing.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    prefix = schedule.warmup_epochs if schedule.warmup_prefix else 0
    arguments: dict[str, Any] = {
        "sched": schedule.sched,
        # timm adds a prefix to its epochs; here --epochs counts the warm-up.
        "num_epochs": schedule.epochs - prefix,
        "decay_epochs": schedule.decay_epochs or None,
        "decay_milestones": list(schedule.decay_milestones),
        "decay_rate": schedule.decay_rate,
        "cooldown_epochs": schedule.cooldown_epochs,
        "min_lr": schedule.min_lr,
        "warmup_lr": schedule.warmup_lr,
        "warmup_epochs": schedule.warmup_epochs,
        "warmup_prefix": schedule.warmup_prefix,
        "step_on_epochs": False,
        "updates_per_epoch": steps_per_epoch,
    }
    try:
        timms: Any
        timms, _ = create_scheduler_v2(optimizer, **{**arguments, **schedule.sched_kwargs})
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"--sched {schedule.sched}: {' '.join(str(error).split())}; see --decay-epochs, "
            "--warmup-epochs and schedule.sched_kwargs"
        ) from None

    def rate(step: int) -> float:
        timms.step_update(step)
        lr: float = optimizer.param_groups[0]["lr"]
        return lr

    return rate


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
