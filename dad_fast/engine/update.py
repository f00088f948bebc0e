"""From a loss to new weights, in a way that a loss or gradient that is not a number cannot harm.

`begin`, `backward` for each micro-batch, `reduce` (the sum over processes), `apply`: unscale (fp16), clip, finite check on the device,
optimizer step that is not applied where the check failed, EMA. Nothing here reads a value on the host, and `backward` and `apply` can
be captured in a CUDA graph. Whatever `apply` reads is the same in all processes, so that what it writes is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dad_fast.config.schema import Config, OptimConfig
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.gradients import SharedGradients, running_statistics
from dad_fast.engine.optimizer import check_optimizer
from dad_fast.errors import UsageError
from dad_fast.loggers.profiling import stage

FUSED = (
    torch.optim.AdamW,
    torch.optim.Adam,
    torch.optim.SGD,
)  # these skip a step by themselves, on the device


def build_optimizer(model: nn.Module, cfg: OptimConfig, cuda: bool) -> torch.optim.Optimizer:
    """timm's optimizer of that name; no weight decay on biases and norms."""
    kwargs = dict(cfg.opt_kwargs)
    check_optimizer(cfg.opt, cuda)

    def create(**extra: Any) -> torch.optim.Optimizer:
        return create_optimizer_v2(
            model,
            opt=cfg.opt,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            momentum=cfg.momentum,
            **kwargs,
            **extra,
        )

    try:
        optimizer = create()
        # Capturable: steps are counted on the device, for CUDA graphs, and so that a refused step is not counted.
        extra = {"capturable": True} if cuda and "capturable" in optimizer.defaults else {}
        if type(optimizer) in FUSED and not {"fused", "foreach"} & kwargs.keys():
            extra["fused"] = True
        optimizer = create(**extra) if extra else optimizer
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UsageError(
            f"--opt {cfg.opt} cannot be built: {error}; see timm.optim.list_optimizers() and optim.opt_kwargs"
        ) from None
    return optimizer


class Update:
    """Owns the optimizer, the gradient scaler and the EMA of one student."""

    def __init__(self, student: nn.Module, cfg: Config, device: torch.device):
        self.student = student
        self.clip_grad = cfg.optim.clip_grad
        self.optimizer = build_optimizer(student, cfg.optim, device.type == "cuda")
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # Batch norm's running statistics: a bad batch has already moved them when its loss is known.
        self.buffers = [b for b in student.buffers() if b.is_floating_point()]
        self.saved_buffers = [b.clone() for b in self.buffers]
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=cfg.precision.amp and cfg.precision.student == "float16"
        )
        self.ema = (
            ModelEmaV3(student, decay=cfg.ema.decay, use_warmup=cfg.ema.warmup)
            if cfg.ema.model_ema
            else None
        )
        if self.ema is not None:
            pairs = list(
                zip(
                    self.ema.module.state_dict().values(),
                    student.state_dict().values(),
                    strict=True,
                )
            )
            self.averaged = [
                list(tensors)
                for tensors in zip(
                    *(pair for pair in pairs if pair[0].is_floating_point()), strict=True
                )
            ]
            self.counts = [
                pair for pair in pairs if not pair[0].is_floating_point()
            ]  # batches that a batch norm has seen
        self.ema_weight, self.loss_sum, self.bad_in_a_row = (
            torch.zeros((), device=device) for _ in range(3)
        )
        # What a CUDA graph reads lies on the device, at an address that stays: the learning rates and, once captured, the gradients.
        on_device = device.type == "cuda" and bool(self.optimizer.defaults.get("fused"))
        self.rates = [
            torch.zeros((), device=device) if on_device else None
            for _ in self.optimizer.param_groups
        ]
        self.static_gradients: list[Tensor] = []
        self.num_processes = distributed.world()
        self.shared: SharedGradients | None = None
        # With fp16 a step that overflows is ordinary: the scaler halves its factor. After thirty in a row, 2^30 times less, it is not.
        self.tolerated = 30 if self.scaler.is_enabled() else 0

    @property
    def capturable(self) -> bool:
        """Whether `apply` can be captured in a CUDA graph: learning rates and steps are on the device."""
        return all(rate is not None for rate in self.rates)

    def begin(self, step: int, lr: float) -> None:
        """Before the forward pass of a step, whatever number of `backward` calls it has."""
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

    def make_gradients_static(self) -> None:
        """From now on gradients are added to the tensors that hold them now, which `begin` zeroes."""
        if self.shared is None:  # else they are that already
            self.static_gradients = [p.grad for p in self.parameters if p.grad is not None]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch. `loss` is this process's mean; their mean is that over the global batch."""
        self.loss_sum += loss.detach()
        self.scaler.scale(loss if self.num_processes == 1 else loss / self.num_processes).backward()

    def reduce(self) -> None:
        """After the last `backward`: from here on gradients, loss and running statistics are those of all processes."""
        if self.num_processes == 1:
            return
        if self.shared is None:
            self.shared = SharedGradients(
                self.parameters, [self.loss_sum, *running_statistics(self.student)]
            )
            self.static_gradients = [self.shared.flat]
        with stage("reduce"):
            self.shared.reduce()

    def apply(self) -> Tensor:
        """The optimizer step; returns whether it was applied, a bool scalar on the device."""
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
        """average += weight (student - average). timm's own update takes the weight as a Python number, which a CUDA graph would freeze."""
        average, latest = self.averaged
        change = torch._foreach_sub(latest, average)
        torch._foreach_mul_(change, self.ema_weight)
        torch._foreach_add_(average, change)
        for count, new in self.counts:
            count.copy_(new)

    def _guarded_step(self, finite: Tensor) -> None:
        optimizer: Any = self.optimizer
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()  # the fused kernels' own way of skipping a step
            optimizer.step()
            return
        # Any other optimizer: take the step, then take back what a bad gradient did. A count that it keeps on the host stays as it is.
        old = [p.detach().clone() for p in self.parameters]
        old_state = {(p, k): v.clone() for p, k, v in self._state_on_device()}
        optimizer.step()
        with torch.no_grad():
            for p, before in zip(self.parameters, old, strict=True):
                p.copy_(torch.where(finite, p, before))
            for p, k, v in self._state_on_device():
                v.copy_(torch.where(finite, v, old_state.get((p, k), torch.zeros_like(v))))

    def _state_on_device(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """The optimizer's tensors: (parameter, name, tensor)."""
        for p, state in self.optimizer.state.items():
            yield from (
                (p, name, value)
                for name, value in state.items()
                if torch.is_tensor(value) and value.device == p.device
            )
