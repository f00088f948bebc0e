"""The DAD authors' own online step, from a clone of their repository, on the workload's batch.

Their code as of August 2023: https://github.com/lapisrocks/DiscreteAdversarialDistillation, commit
c364c63, Apache-2.0. Nothing of it is part of this repository: attack, VQGAN and loss are loaded
from the clone, and the step calls them in the order of `train_one_epoch` in its
imagenet/dad/main.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from benchmarks.timm_kd import BareTeacher
from benchmarks.workload import Workload
from dad_fast.data.augment.mixing import mix, to_pixels
from dad_fast.methods.losses import smooth

COMMIT = "c364c63"
EXAMPLE = "easyrobust/examples/imageclassification/imagenet/dad"


class AuthorsStep:
    """One call is one step on the workload's batch: float32 and eager, or as `fast` says."""

    def __init__(self, work: Workload, clone: Path, fast: bool = False) -> None:
        """Load the authors' modules from `clone`, a checkout of COMMIT.

        fast: use autocast of the workload's student and channels_last. Their scripts use neither.
        Raises ModuleNotFoundError if `clone` is another repository.
        """
        cfg, batch, device = work.cfg, work.batch, work.device
        with _importable(clone):
            attacks = importlib.import_module("easyrobust.attacks.pgd")
            vqgan = importlib.import_module("easyrobust.third_party.vqgan")
            loss = importlib.import_module("loss")
        self.attack: Callable[..., Tensor] = attacks.pgd_generator
        self.reconstruct: Callable[..., Tensor] = vqgan.reconstruct_with_vqgan
        self.new_loss: Callable[..., Any] = loss.DADLoss
        self.vqgan = _with_weights_of(vqgan.VQModel, work.discretizer.vqgan).to(device).eval()

        student = work.student()
        self.model: Any = student.model
        self.teacher = BareTeacher(work.plain_teacher).to(device).eval().requires_grad_(False)
        self.optimizer = create_optimizer_v2(
            self.model, opt=cfg.optim.opt, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay
        )
        self.ema = ModelEmaV3(self.model, decay=cfg.ema.decay) if cfg.ema.model_ema else None

        how = batch.labels, batch.mix_kind, batch.mix_lam, batch.mix_box, work.num_classes
        mixed = mix(to_pixels(batch.images), *how)
        self.images = mixed.pixels
        self.targets = smooth(mixed.targets, cfg.augment.smoothing)
        self.clip_grad = cfg.optim.clip_grad
        self.device, self.fast = device, fast
        self.dtype = getattr(torch, cfg.precision.student)
        if fast:
            for module in (self.model, self.teacher, self.vqgan):
                module.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)

    def __call__(self) -> float:
        self.model.train()
        with self._autocast():
            clean = self.model(self.images)
            teacher_clean = self.teacher(self.images)
        with torch.no_grad(), self._autocast():
            reconstructed = self.reconstruct(self.images, self.vqgan)
        with self._autocast():
            adversarial = self.attack(
                reconstructed,
                self.images,
                self.targets,
                self.model,
                self.teacher,
                clean,
                teacher_clean,
                self.vqgan,
                attack_type="L2",
                eps=0.1,
                attack_steps=1,
                attack_lr=0.1,
                random_start_prob=0.8,
                use_best=False,
                attack_criterion="kd",
                eval_mode=False,
            )
            other = self.model(adversarial)
            teacher_other = self.teacher(adversarial)
            criterion = self.new_loss(self.teacher, self.model, None, None, None, self.optimizer)
            loss = criterion.calculate_kd_loss(
                clean, teacher_clean, teacher_other, other, self.targets, ""
            )
        value = float(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_grad:
            dispatch_clip_grad(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return value

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.fast)


def _with_weights_of(make: Callable[..., nn.Module], own: Any) -> nn.Module:
    """Return the authors' VQGAN of the shape and with the weights of ours."""
    config = own.config
    resolution = 256  # nominal: it only places the attention
    shape = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": resolution,
        "in_channels": config.in_channels,
        "out_ch": config.in_channels,
        "ch": config.ch,
        "ch_mult": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [resolution >> level for level in config.attn_levels],
        "dropout": 0.0,
    }
    model = make(shape, n_embed=config.n_embed, embed_dim=config.embed_dim)
    model.load_state_dict(own.state_dict())
    return model


@contextmanager
def _importable(clone: Path) -> Iterator[None]:
    """Make the clone's modules importable, without running its packages' `__init__`, which import
    what the step does not need.
    """
    root = clone / "easyrobust" / "easyrobust"
    if not root.is_dir():
        raise ModuleNotFoundError(f"--authors-code {clone}: no easyrobust/easyrobust in it")
    packages = {
        "easyrobust": root,
        "easyrobust.attacks": root / "attacks",
        "easyrobust.third_party": root / "third_party",
    }
    for name, folder in packages.items():
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    sys.path.insert(0, str(clone / EXAMPLE))
    try:
        yield
    finally:
        sys.path.remove(str(clone / EXAMPLE))
