"""From a loss to new weights, in a way that a loss or gradient that is not a number cannot harm.

backward, unscale (fp16), clip, finite check on the device, optimizer step that is not applied where the check failed, EMA.
Nothing here reads a value on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dad_fast.config.schema import Config, OptimConfig
from dad_fast.errors import UsageError

FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)  # these skip a step by themselves, on the device


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer of that name; no weight decay on biases and norms."""
    kwargs = dict(cfg.opt_kwargs)

    def create(**extra: Any) -> torch.optim.Optimizer:
        return create_optimizer_v2(model, opt=cfg.opt, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum, **kwargs, **extra)

    try:
        optimizer = create()
        if type(optimizer) in FUSED and not {"fused", "foreach"} & kwargs.keys():
            optimizer = create(fused=True)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"--opt {cfg.opt} cannot be built: {error}; see timm.optim.list_optimizers() and optim.opt_kwargs") from None
    return optimizer


class Update:
    """Owns the optimizer, the gradient scaler and the EMA of one student."""

    def __init__(self, student: nn.Module, cfg: Config, device: torch.device):
        self.student = student
        self.clip_grad = cfg.optim.clip_grad
        self.optimizer = build_optimizer(student, cfg.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # Batch norm's running statistics: a bad batch has already moved them when its loss is known.
        self.buffers = [b for b in student.buffers() if b.is_floating_point()]
        self.saved_buffers = [b.clone() for b in self.buffers]
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision.amp and cfg.precision.student == "float16")
        self.ema = ModelEmaV3(student, decay=cfg.ema.decay, use_warmup=cfg.ema.warmup) if cfg.ema.model_ema else None
        self.bad_in_a_row = torch.zeros((), device=device)
        # With fp16 a step that overflows is ordinary: the scaler halves its factor. 2^30 halvings later it is not.
        self.tolerated = 30 if self.scaler.is_enabled() else 0

    def remember_buffers(self) -> None:
        """Call before the forward pass."""
        if self.buffers:
            torch._foreach_copy_(self.saved_buffers, self.buffers)

    def __call__(self, loss: Tensor, step: int, lr: float) -> Tensor:
        """One optimizer step; returns whether it was applied, a bool scalar on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        max_norm = self.clip_grad if self.clip_grad > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self._guarded_step(finite)
        if self.scaler.is_enabled():
            self.scaler.update()
        if self.buffers:
            for buffer, saved in zip(self.buffers, self.saved_buffers, strict=True):
                buffer.copy_(torch.where(finite, buffer, saved))
        if self.ema is not None:
            self.ema.update(self.student, step)
        self.bad_in_a_row = torch.where(finite, 0.0, self.bad_in_a_row + 1)
        return finite

    def _guarded_step(self, finite: Tensor) -> None:
        optimizer: Any = self.optimizer
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()  # the fused kernels' own way of skipping a step
            optimizer.step()
            return
        # Any other optimizer: take the step, then take back what a bad gradient did.
        old = [p.detach().clone() for p in self.parameters]
        old_state = {(p, k): v.clone() for p, s in optimizer.state.items() for k, v in s.items() if torch.is_tensor(v)}
        optimizer.step()
        with torch.no_grad():
            for p, before in zip(self.parameters, old, strict=True):
                p.copy_(torch.where(finite, p, before))
            for p, s in optimizer.state.items():
                for k, v in s.items():
                    if torch.is_tensor(v):
                        v.copy_(torch.where(finite.to(v.device), v, old_state.get((p, k), torch.zeros_like(v))))
