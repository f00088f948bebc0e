"""Decide the numbers that are "auto" from the size of the training set and the discretizer.

They are decided once, before a run begins, so that its config.toml has numbers. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dad_fast.config.fields import get, with_values
from dad_fast.config.schema import Config
from dad_fast.config.setting import AUTO
from dad_fast.data.sources.survey import survey
from dad_fast.discretizers.registry import visible_budget
from dad_fast.errors import UsageError

BATCH, EPOCHS, WARM_UP = "data.batch_size", "schedule.epochs", "schedule.warmup_epochs"
# At least this many steps an epoch, by a batch between these sizes.
STEPS_AN_EPOCH, SMALLEST_BATCH, LARGEST_BATCH = 20, 8, 128
# Images that a run sees, by a number of epochs between these.
IMAGES_SEEN, FEWEST_EPOCHS, MOST_EPOCHS = 500_000, 15, 100
WARM_UP_SHARE = 0.1


def with_numbers(
    cfg: Config, num_images: int | None = None, num_processes: Callable[[], int] = lambda: 1
) -> Config:
    """Return `cfg` with a number in place of every "auto", except for the loader's workers.

    num_images: of the training set; None = counted, with the errors of a run for data that is not
    there. num_processes: of the run, which share the batch; called last.
    """
    cfg = with_attack(cfg)
    asked = {path for path in (BATCH, EPOCHS, WARM_UP) if get(cfg, path) == AUTO}
    if not asked:
        return cfg
    values: dict[str, Any] = {}
    if asked & {BATCH, EPOCHS}:
        count = survey(cfg.data).num_images if num_images is None else num_images
        at_once = num_processes() * cfg.engine.grad_accum_steps
        values |= {BATCH: batch_size(count, at_once), EPOCHS: num_epochs(count)}
    epochs = values[EPOCHS] if EPOCHS in asked else cfg.schedule.epochs
    values[WARM_UP] = round(WARM_UP_SHARE * epochs, 2)
    return with_values(cfg, {path: values[path] for path in asked})


def with_attack(cfg: Config) -> Config:
    """Return `cfg` with numbers for the attack; they need no data.

    Raises UsageError for a norm without a budget of its own.
    """
    eps, step_size = cfg.attack.eps, cfg.attack.step_size
    if eps == AUTO and cfg.attack.norm != "l2":
        raise UsageError(
            f"--attack-eps auto is an L2 budget: give --attack-eps for --attack-norm {cfg.attack.norm}"
        )
    eps = visible_budget(cfg.discretizer.name) if eps == AUTO else eps
    return with_values(
        cfg, {"attack.eps": eps, "attack.step_size": eps if step_size == AUTO else step_size}
    )


def batch_size(num_images: int, at_once: int = 1) -> int:
    """Return the even batch of each of `at_once` micro-batches of a step.

    Together they are a power of two that gives an epoch at least 20 steps, if it can be.
    """
    whole = SMALLEST_BATCH
    while whole < LARGEST_BATCH and 2 * whole * STEPS_AN_EPOCH <= num_images:
        whole *= 2
    return max(2, whole // at_once // 2 * 2)


def num_epochs(num_images: int) -> int:
    """Return the epochs in which a run sees half a million images, from 15 to 100."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(IMAGES_SEEN / max(1, num_images))))
