"""Optimizer step: unscale, clip, finite check, step, EMA. Non-finite steps are skipped.

A step calls `begin`, `backward` for each micro-batch, `reduce` (the sum over processes) and
`apply`. With an optimizer that skips steps on the device (`optimizer.skips_on_device`) nothing here
reads a value on the host, so `backward` and `apply` can be captured in CUDA graphs. With any other,
`apply` reads the finite check and leaves the optimizer alone where it failed. `apply` reads only
values that are equal in all processes, and so writes equal weights in all of them.

A run with a skipped step has the weights and the optimizer state of a run without that step, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dad_fast.config.schema import Config
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.gradients import SharedGradients, running_statistics
from dad_fast.engine.optimizer import build_optimizer, fill_momentum, skips_on_device
from dad_fast.loggers.profiling import stage


class Update:
    """Owns the optimizer, the gradient scaler and the EMA of one student."""

    def __init__(self, student: nn.Module, cfg: Config, device: torch.device):
        """Create an update of `student`, whose weights already lie on `device`.

        Raises UsageError or EnvironmentProblem for an optimizer that cannot be built.
        """
        self.student = student
        self.clip_grad = cfg.optim.clip_grad
        self.optimizer = build_optimizer(student, cfg.optim, device.type == "cuda")
        self.skips_on_device = skips_on_device(self.optimizer)
        if self.skips_on_device:
            fill_momentum(self.optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        # Batch norm's running statistics: a bad batch has already changed them when its loss is
        # known.
        self.buffers = [b for b in student.buffers() if b.is_floating_point()]
        self.saved_buffers = [b.clone() for b in self.buffers]
        is_float16 = bool(cfg.precision.amp) and cfg.precision.student == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_float16)

        self.ema: ModelEmaV3 | None = None
        if cfg.ema.model_ema:
            self.ema = ModelEmaV3(student, decay=cfg.ema.decay, use_warmup=cfg.ema.warmup)
            averages = self.ema.module.state_dict().values()
            pairs = list(zip(averages, student.state_dict().values(), strict=True))
            averaged = [pair for pair in pairs if pair[0].is_floating_point()]
            self.averages = [average for average, _ in averaged]
            self.latest = [latest for _, latest in averaged]
            # Batches that a batch norm has seen: copied, not averaged.
            self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.ema_weight = torch.zeros((), device=device)
        self.loss_sum = torch.zeros((), device=device)
        self.bad_in_a_row = torch.zeros((), device=device)

        # A CUDA graph reads from fixed addresses on the device: the learning rates and, once
        # captured, the gradients.
        on_device = device.type == "cuda" and self.skips_on_device
        self.rates = [
            torch.zeros((), device=device) if on_device else None
            for _ in self.optimizer.param_groups
        ]
        self.static_gradients: list[Tensor] = []
        self.num_processes = distributed.world()
        self.shared: SharedGradients | None = None
        # With fp16 an overflow is ordinary: the scaler halves its factor. Thirty in a row (2^30
        # times less) are not.
        self.tolerated = 30 if self.scaler.is_enabled() else 0

    @property
    def capturable(self) -> bool:
        """True if `apply` can be captured in a CUDA graph: learning rates and steps are on the
        device.
        """
        return all(rate is not None for rate in self.rates)

    def begin(self, step: int, lr: float) -> None:
        """Begin a step, before its first forward pass: set the learning rate and zero the
        gradients.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            value = lr * group.get("lr_scale", 1.0)
            group["lr"] = value if rate is None else rate.fill_(value)
        if self.ema is not None:
            self.ema_weight.fill_(1.0 - self.ema.get_decay(step))
        if self.static_gradients:
            torch._foreach_zero_(self.static_gradients)
        else:
            self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum.zero_()
        if self.buffers:
            torch._foreach_copy_(self.saved_buffers, self.buffers)

    @contextmanager
    def being_captured(self) -> Iterator[None]:
        """Prepare for a capture of `backward` and `apply`; if it breaks, they work as before it.

        A broken capture has run nothing on the device. On the host it may have marked the gradients
        as unscaled.
        """
        groups = [group for group in self.optimizer.param_groups if "capturable" in group]
        # torch asks for the flag during a capture and warns of it in any other step. The fused
        # kernels are the same with and without it.
        for group in groups:
            group["capturable"] = True
        try:
            yield
        except BaseException:
            if self.scaler.is_enabled():
                self.scaler.update(self.scaler.get_scale())
            raise
        finally:
            for group in groups:
                group["capturable"] = False

    def make_gradients_static(self) -> None:
        """Keep gradients in the tensors that hold them now: `begin` zeroes these, `backward` adds
        to them.
        """
        # Shared gradients are static already.
        if self.shared is None:
            self.static_gradients = [p.grad for p in self.parameters if p.grad is not None]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch. `loss` is the mean over this process's images."""
        self.loss_sum += loss.detach()
        self.scaler.scale(loss if self.num_processes == 1 else loss / self.num_processes).backward()

    def reduce(self) -> None:
        """Sum gradients, loss and running statistics over all processes, after the last
        `backward`.
        """
        if self.num_processes == 1:
            return
        if self.shared is None:
            others = [self.loss_sum, *running_statistics(self.student)]
            self.shared = SharedGradients(self.parameters, others)
            self.static_gradients = [self.shared.flat]
        with stage("reduce"):
            self.shared.reduce()

    def apply(self) -> Tensor:
        """Make the optimizer step. Returns a bool scalar on the device: True if it was applied."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        max_norm = self.clip_grad if self.clip_grad > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        finite = torch.isfinite(norm) & torch.isfinite(self.loss_sum)
        self._guarded_step(finite)
        if self.scaler.is_enabled():
            self.scaler.update()
        if self.buffers:
            for buffer, saved in zip(self.buffers, self.saved_buffers, strict=True):
                buffer.copy_(torch.where(finite, buffer, saved))
        if self.ema is not None:
            self._average()
        self.bad_in_a_row.copy_(torch.where(finite, 0.0, self.bad_in_a_row + 1))
        return finite

    @torch.no_grad()
    def _average(self) -> None:
        """Update the EMA: average += weight (student - average).

        timm's own update takes the weight as a Python number, which a CUDA graph would freeze.
        """
        change = torch._foreach_sub(self.latest, self.averages)
        torch._foreach_mul_(change, self.ema_weight)
        torch._foreach_add_(self.averages, change)
        for count, new in self.counts:
            count.copy_(new)

    def _guarded_step(self, finite: Tensor) -> None:
        optimizer: Any = self.optimizer
        if self.skips_on_device:
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        # Waits for the device: nothing else can skip a step of any optimizer exactly.
        elif finite.item():
            optimizer.step()
