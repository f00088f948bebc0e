"""Settings of optimizer, schedule and EMA. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dad_fast.config.setting import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    setting,
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    opt: str = setting("adamw", "optimizer, by timm's name", "--opt")
    opt_betas: tuple[float, ...] = setting(
        (), "betas of the optimizer; empty = its own", "--opt-betas"
    )
    opt_eps: float = setting(
        0.0, "epsilon of the optimizer; 0 = its own", "--opt-eps", rule=NOT_NEGATIVE
    )
    lr: float = setting(1e-3, "peak learning rate", "--lr", rule=POSITIVE, main=True)
    lr_base: float = setting(
        0.0,
        "instead of --lr: the peak learning rate at a global batch of --lr-base-size; 0 = off",
        "--lr-base",
        rule=NOT_NEGATIVE,
    )
    lr_base_size: int = setting(
        256, "global batch to which --lr-base belongs", "--lr-base-size", rule=AT_LEAST_ONE
    )
    lr_base_scale: Literal["auto", "linear", "sqrt"] = setting(
        "auto",
        "how --lr-base grows with the global batch; auto: sqrt for Adam's relatives and LAMB, "
        "else linear",
        "--lr-base-scale",
    )
    layer_decay: float = setting(
        0.0,
        "multiply the learning rate by this for each layer below the last; 0 = off",
        "--layer-decay",
        rule=PROBABILITY,
    )
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
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = (
        setting(
            "cosine",
            "after the warm-up: cosine, or timm's tanh, step, multistep, poly, wsd, rsqrt, constant",
            "--sched",
        )
    )
    epochs: int = setting(
        300,
        "epochs of warm-up and schedule; auto: 15 to 100, by the data's size",
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
        "start the schedule after the warm-up; off: at step 0, under the warm-up, as timm does "
        "unless it is given this flag. Both end at --epochs",
        "--warmup-prefix",
    )
    cooldown_epochs: float = setting(
        0.0,
        "epochs after the schedule, for cosine at min-lr",
        "--cooldown-epochs",
        rule=NOT_NEGATIVE,
    )
    decay_epochs: float = setting(
        0.0,
        "step: epochs between decays; wsd, rsqrt: epochs of the decay, or below 1 their share; "
        "0 = timm's 90 or 0.2",
        "--decay-epochs",
        rule=NOT_NEGATIVE,
    )
    decay_milestones: tuple[float, ...] = setting(
        (90.0, 180.0, 270.0), "multistep: epochs of the decays", "--decay-milestones"
    )
    decay_rate: float = setting(
        0.1, "step, multistep: factor of a decay; poly: its power", "--decay-rate", rule=POSITIVE
    )
    sched_kwargs: dict[str, Any] = setting(
        {}, "further arguments of timm's schedule, such as cycle_limit or noise"
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
