"""Plain distillation by timm: an independent denominator of every ratio.

timm's LogitDistillationTask and optimizer in the step of timm's train.py: normalised images,
autocast, backward, clipping, optimizer, EMA. Labels and images are mixed in advance (timm mixes in
its loader, unmeasured here; our measured step includes mixing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from benchmarks.workload import Workload
from dad_fast.data.augment.mixing import mix, to_pixels
from dad_fast.methods.losses import smooth
from dad_fast.models.float32 import float32_math
from dad_fast.models.teacher import Teacher

try:
    from timm.task import LogitDistillationTask
except ImportError:  # a timm before 1.0.31, on a machine without a package index
    LogitDistillationTask = None


def kd_baseline(work: Workload) -> tuple[str, Callable[[], object]]:
    """Return the name and the step that ratios refer to: timm's, or our own plain "kd" if this timm
    has none.
    """
    if LogitDistillationTask is not None:
        return "kd (timm)", TimmKD(work)
    step = work.step(work.with_method("kd"))
    return "kd", lambda: step(work.batch, 10, work.cfg.optim.lr)


class BareTeacher(nn.Module):
    """Wrap a teacher to take normalised images, as timm expects."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.pretrained_cfg = {
            "mean": tuple(teacher.mean.flatten().tolist()),
            "std": tuple(teacher.std.flatten().tolist()),
        }

    def forward(self, x: Tensor) -> Tensor:
        teacher = self.teacher
        if teacher.whole is not None:
            return teacher.whole(x)
        features = teacher.encoder(x)
        features = nn.functional.normalize(features, dim=-1) if teacher.unit_features else features
        return nn.functional.linear(features, teacher.head_weight, teacher.head_bias)


class TimmKD:
    """Training step of timm on the workload's batch; one call is one step."""

    def __init__(self, work: Workload) -> None:
        cfg, batch, device = work.cfg, work.batch, work.device
        student = work.student()
        self.model: Any = student.model
        self.task = LogitDistillationTask(
            self.model,
            BareTeacher(work.plain_teacher),
            criterion=SoftTargetCrossEntropy(),
            task_loss_weight=cfg.loss.ce,
            distill_loss_weight=cfg.loss.kd,
            temperature=cfg.loss.temperature,
            device=device,
            verbose=False,
        ).train()
        self.optimizer = create_optimizer_v2(
            self.model, opt=cfg.optim.opt, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay
        )
        self.ema = (
            ModelEmaV3(self.model, decay=cfg.ema.decay, use_warmup=cfg.ema.warmup)
            if cfg.ema.model_ema
            else None
        )
        mixed = mix(
            to_pixels(batch.images),
            batch.labels,
            batch.mix_kind,
            batch.mix_lam,
            batch.mix_box,
            work.num_classes,
        )
        layout = torch.channels_last if cfg.precision.channels_last else torch.contiguous_format
        self.images = (mixed.pixels * 255).round().to(torch.uint8, memory_format=layout)
        self.targets = smooth(mixed.targets, cfg.augment.smoothing)
        self.mean, self.std = student.mean * 255, student.std * 255
        self.cfg, self.device = cfg, device

    def __call__(self) -> Tensor:
        with float32_math(tf32=self.cfg.precision.tf32):
            return self._step()

    def _step(self) -> Tensor:
        precision = self.cfg.precision
        x = (self.images.float() - self.mean) / self.std
        dtype = getattr(torch, precision.student)
        with torch.autocast(self.device.type, dtype, enabled=bool(precision.amp)):
            loss = self.task(x, self.targets)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        if self.cfg.optim.clip_grad:
            dispatch_clip_grad(self.model.parameters(), self.cfg.optim.clip_grad)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=10)
        return loss.detach()
