"""State and step of a VQGAN's training: model, optimizer, codebook, statistics of a log window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dad_fast.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from dad_fast.config.options_fit import FitOptions
from dad_fast.config.schema import OptimConfig, ScheduleConfig
from dad_fast.discretizers.vqgan.config import VQGANConfig
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.discretizers.vqgan.training import (
    DeadCodes,
    MovingCodebook,
    perplexity,
    training_pass,
)
from dad_fast.engine.schedule import learning_rate
from dad_fast.keyed_random import sample_seeds
from dad_fast.tools.fit_discretizer.perceptual import Perceptual

# Widths of the levels, relative to the first, by the side of a code in pixels
CH_MULT = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}
LOSSES = ("loss", "l1", "l2", "commitment")
# Share of the steps after which codes are no longer restarted, so that all can settle.
RESTARTS_UNTIL = 0.7
WARM_UP = 0.05


def vqgan_config(options: FitOptions) -> VQGANConfig:
    """Return the VQGAN of the options."""
    levels = tuple(int(level) for level in options.levels.split(",") if level)
    dim = len(levels) or options.dim
    return VQGANConfig(
        ch=options.width,
        ch_mult=CH_MULT[int(options.factor)],
        num_res_blocks=1,
        attn_levels=(),
        z_channels=dim,
        embed_dim=dim,
        n_embed=math.prod(levels) if levels else options.codes,
        norm_groups=8 if options.width % 8 == 0 else 4,
        quantizer="fsq" if levels else "nearest",
        levels=levels,
    )


class Fit:
    """Trains a VQGAN by reconstruction (L1 + L2, and a perceptual term if given) and commitment.

    The codebook moves by averages of its latents; dead codes restart. FSQ has a fixed one.
    """

    def __init__(
        self,
        options: FitOptions,
        total_steps: int,
        device: torch.device,
        perceptual: Perceptual | None = None,
    ) -> None:
        self.options = options
        self.perceptual = perceptual
        self.losses = (*LOSSES, "perceptual") if perceptual else LOSSES
        self.total_steps = total_steps
        self.device = device
        self.vqgan = VQGAN(vqgan_config(options)).to(device)
        self.is_learned = self.vqgan.config.quantizer != "fsq"
        # Moved by `MovingCodebook`, not by the optimizer.
        self.vqgan.codebook.requires_grad_(False)
        trained = [p for p in self.vqgan.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=options.lr,
        )
        self.dead = DeadCodes(self.vqgan)
        self.moving = MovingCodebook(self.vqgan, options.decay)
        # Of the steps since the last log line: sums of the losses, their number, uses of each code
        self.sums = torch.zeros(len(self.losses) + 1, device=device)
        self.uses = torch.zeros(self.vqgan.config.n_embed, dtype=torch.int64, device=device)

    def step(self, number: int, steps_per_epoch: int, pixels: Tensor) -> float:
        """Train on `pixels` [B, 3, H, W] in [0, 1]. Returns the learning rate."""
        lr = self._learning_rate(number, steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        latents = self.vqgan.encode(pixels)
        if self.is_learned and number < RESTARTS_UNTIL * self.total_steps:
            seed = int(sample_seeds(self.options.seed, number, np.array([0]))[0])
            drawn = torch.Generator().manual_seed(seed)
            self.moving.restart(self.dead.restart(latents, drawn))
        found = training_pass(self.vqgan, pixels, latents)
        loss = found.l1 + found.l2 + self.options.commitment * found.commitment
        values = [found.l1, found.l2, found.commitment]
        if self.perceptual is not None:
            distance = self.perceptual((found.decoded + 1.0) / 2.0, pixels)
            loss = loss + self.options.perceptual_weight * distance
            values.append(distance)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.vqgan.parameters(), 1.0)
        self.optimizer.step()
        if self.is_learned:
            self.dead.count(found.codes)
            self.moving.update(latents, found.codes)
        values = [loss, *values, loss.new_ones(())]
        self.sums += torch.stack([value.detach().float() for value in values])
        self.uses += torch.bincount(found.codes.flatten(), minlength=len(self.uses))
        return lr

    def _learning_rate(self, number: int, steps_per_epoch: int) -> float:
        lr, epochs = self.options.lr, self.options.epochs
        schedule = ScheduleConfig(
            epochs=epochs, warmup_epochs=WARM_UP * epochs, warmup_lr=lr / 25, min_lr=lr / 1000
        )
        return learning_rate(number, steps_per_epoch, OptimConfig(lr=lr), schedule)

    def window(self) -> dict[str, float]:
        """Return the means since the last call, and the use of codes; begin a new window.

        "codes_used" is a share; "perplexity" the number of codes in even use that it is worth.
        Reads from the device.
        """
        *sums, count = self.sums.tolist()
        values = {name: value / count for name, value in zip(self.losses, sums, strict=True)}
        values["codes_used"] = (self.uses > 0).float().mean().item()
        values["perplexity"] = perplexity(self.uses)
        self.sums.zero_()
        self.uses.zero_()
        return values

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors, not copied, and JSON of a checkpoint."""
        tensors, optimizer = flatten_optimizer(self.optimizer)
        tensors |= {f"vqgan.{name}": value for name, value in self.vqgan.state_dict().items()}
        return tensors | self._others(), {"optimizer": optimizer}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint of the same options."""
        own = {name: tensors[f"vqgan.{name}"] for name in self.vqgan.state_dict()}
        self.vqgan.load_state_dict(own)
        restore_optimizer(self.optimizer, tensors, state["optimizer"])
        for name, value in self._others().items():
            value.copy_(tensors[name])

    def _others(self) -> dict[str, Tensor]:
        return {
            "dead.unused": self.dead.unused,
            "moving.counts": self.moving.counts,
            "moving.sums": self.moving.sums,
            "window.sums": self.sums,
            "window.uses": self.uses,
        }
