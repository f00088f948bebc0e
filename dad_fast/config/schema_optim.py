"""Settings of optimizer, schedule and EMA. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dad_fast.config.setting import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, setting


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    opt: str = setting("adamw", "optimizer, by timm's name", "--opt")
    lr: float = setting(1e-3, "peak learning rate", "--lr", rule=POSITIVE, main=True)
    weight_decay: float = setting(
        0.05, "weight decay (not on biases and norms)", "--weight-decay", rule=NOT_NEGATIVE
    )
    momentum: float = setting(
        0.9, "momentum, for optimizers that have one", "--momentum", rule=BELOW_ONE
    )
    clip_grad: float = setting(
        0.0, "clip the gradient's norm; 0 = off", "--clip-grad", rule=NOT_NEGATIVE
    )
    opt_kwargs: dict[str, Any] = setting({}, "further arguments of the optimizer")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    epochs: int = setting(
        300,
        "epochs of warm-up and cosine; auto: 15 to 100, by the data's size",
        "--epochs",
        rule=AT_LEAST_ONE,
        main=True,
        auto=True,
    )
    warmup_epochs: float = setting(
        5.0,
        "linear warm-up; auto: a tenth of the epochs",
        "--warmup-epochs",
        rule=NOT_NEGATIVE,
        auto=True,
    )
    warmup_prefix: bool = setting(
        True,
        "start the cosine after the warm-up; off: at step 0, under the warm-up, as timm does unless "
        "it is given this flag. Both end at --epochs",
        "--warmup-prefix",
    )
    cooldown_epochs: float = setting(
        0.0, "epochs at min-lr after the cosine", "--cooldown-epochs", rule=NOT_NEGATIVE
    )
    warmup_lr: float = setting(
        1e-6, "learning rate at the start of the warm-up", "--warmup-lr", rule=NOT_NEGATIVE
    )
    min_lr: float = setting(
        1e-5, "learning rate at the end of the cosine", "--min-lr", rule=NOT_NEGATIVE
    )


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    model_ema: bool = setting(
        False, "keep an exponential moving average of the weights and evaluate it", "--model-ema"
    )
    decay: float = setting(0.9998, "its decay per step", "--model-ema-decay", rule=BELOW_ONE)
    warmup: bool = setting(
        True,
        "let the decay rise to its value as timm's 1-(1+step)^(-2/3): 0.99 after 1,000 steps, "
        "0.9998 after 354,000; off: the same from the start",
        "--model-ema-warmup",
    )
