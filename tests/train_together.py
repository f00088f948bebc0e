"""Run a few steps of every method on synthetic images, in one of several processes.

    python train_together.py LIST

LIST is JSON: [name, method, student, grad_accum_steps, dtype, step with a NaN] for each.

Prints a JSON line for each: the losses over the global batch, and a hash of weights, EMA and
optimizer of this process.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace

import torch

from dad_fast.config.schema import (
    AttackConfig,
    Config,
    EmaConfig,
    EngineConfig,
    OptimConfig,
    StudentConfig,
)
from dad_fast.data.loaders.steps import Batch
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.model import VQGAN, VQGANConfig
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.build import make_step
from dad_fast.engine.update import Update
from dad_fast.models.student import build_student

GLOBAL, CLASSES, SIDE, STEPS = 24, 4, 16, 4
STUDENTS = {
    "ln": StudentConfig(
        name="vit_tiny_patch16_224",
        model_kwargs={"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    ),
    "bn": StudentConfig(
        name="resnet18", model_kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    ),
}


class LinearTeacher(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(3)
        self.head = torch.nn.Linear(3 * SIDE * SIDE, CLASSES).requires_grad_(False).to(dtype)

    def forward(self, pixels):
        return self.head(pixels.flatten(1).to(self.head.weight.dtype)) * 20


def discretizer(dtype):
    """A VQGAN without operations in 32 bits, where 64 bits are compared."""
    if dtype is torch.float64:
        return load_discretizer("identity", Config().precision, torch.device("cpu"))
    torch.manual_seed(4)
    vqgan = VQGAN(
        VQGANConfig(
            ch=8,
            ch_mult=(1, 2),
            num_res_blocks=1,
            attn_levels=(),
            z_channels=4,
            embed_dim=4,
            n_embed=32,
        )
    )
    return VQGANDiscretizer(vqgan.eval().requires_grad_(False), Config().precision)


def global_batch(step):
    g = torch.Generator().manual_seed(step)
    return Batch(
        images=torch.randint(0, 256, (GLOBAL, 3, SIDE, SIDE), generator=g, dtype=torch.uint8),
        labels=torch.randint(0, CLASSES, (GLOBAL,), generator=g),
        samples=torch.arange(GLOBAL),
        seeds=torch.arange(GLOBAL) * 977 + step,
        mix_kind=torch.randint(0, 2, (GLOBAL // 2,), generator=g).repeat_interleave(2),
        mix_lam=torch.rand(GLOBAL // 2, generator=g).repeat_interleave(2),
        mix_box=torch.zeros(GLOBAL, 4, dtype=torch.int64),
        epoch=0,
        step=step,
        replaced=(),
    )


def poisoned(batch):
    """Put NaN into the last image, which one process has; all must skip the step."""
    batch.mix_lam[-2:] = float("nan")
    batch.mix_kind[-2:] = 1
    return batch


def stretch(batch, rank, world):
    size = GLOBAL // world
    return replace(
        batch,
        **{
            k: v[rank * size : (rank + 1) * size]
            for k, v in vars(batch).items()
            if isinstance(v, torch.Tensor)
        },
    )


def train(method, student, parts, dtype, bad_step=-1):
    dtype = getattr(torch, dtype)
    cfg = Config(
        method=method,
        student=STUDENTS[student],
        attack=AttackConfig(norm="l2", eps=0.5, step_size=0.4, steps=2),
        engine=EngineConfig(grad_accum_steps=parts),
        ema=EmaConfig(model_ema=True),
        optim=OptimConfig(clip_grad=0.5),
    )
    torch.manual_seed(0)
    model = build_student(cfg.student, CLASSES, SIDE).to(dtype)
    update = Update(model, cfg, torch.device("cpu"))
    step = make_step(cfg, model, LinearTeacher(dtype), discretizer(dtype), update)
    losses, rank, world = [], distributed.rank(), distributed.world()
    for number in range(STEPS):
        batch = poisoned(global_batch(number)) if number == bad_step else global_batch(number)
        (scalars,) = step(stretch(batch, rank, world), number, 1e-2)
        assert bool(scalars["applied"]) == (number != bad_step)
        losses.append(sum(distributed.all_gather_json(scalars["loss"].item())) / world)
    found = hashlib.sha256()
    moments = [
        value
        for entry in update.optimizer.state_dict()["state"].values()
        for value in entry.values()
    ]
    for tensor in [
        *model.state_dict().values(),
        *update.ema.module.state_dict().values(),
        *moments,
    ]:
        found.update(tensor.numpy().tobytes())
    return losses, found.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init(Config(device="cpu"))
    for name, *what in json.loads(sys.argv[1]):
        losses, digest = train(*what)
        print(json.dumps([name, losses, digest]))
    distributed.barrier()
    distributed.close()
    # Skips the unloading of modules, which takes long.
    os._exit(0)
