"""Compute losses and gradients of a few steps with SharedGradients and with DDP.

Prints two JSON lines, each {method: [numbers of a step, for each step]}.
"""

import json
import os

import torch

from benchmarks.ddp import with_ddp
from dad_fast.config.schema import AttackConfig, Config
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.build import make_step
from dad_fast.engine.update import Update
from dad_fast.models.student import build_student
from tests.train_together import (
    CLASSES,
    SIDE,
    STEPS,
    STUDENTS,
    LinearTeacher,
    discretizer,
    global_batch,
    stretch,
)

ONE_TENSOR, EXACT = (lambda step: step), torch.float64


def train(method, wrapped):
    """Return [loss over the global batch, norm of each gradient, some of its values] per step."""
    cfg = Config(
        method=method,
        student=STUDENTS["ln"],
        attack=AttackConfig(norm="l2", eps=0.5, step_size=0.4, steps=2),
    )
    torch.manual_seed(0)
    model = build_student(cfg.student, CLASSES, SIDE).to(EXACT)
    update = Update(model, cfg, torch.device("cpu"))
    step = wrapped(make_step(cfg, model, LinearTeacher(EXACT), discretizer(EXACT), update))
    found, rank, world = [], distributed.rank(), distributed.world()
    for number in range(STEPS):
        loss = step(stretch(global_batch(number), rank, world), number, 1e-2)[0]["loss"].item()
        gradients = [p.grad for p in model.parameters()]
        values = [
            value
            for g in gradients
            for value in (g.norm().item(), *g.flatten()[:: 1 + g.numel() // 8].tolist())
        ]
        found.append([sum(distributed.all_gather_json(loss)) / world, *values])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init(Config(device="cpu"))
    for wrapped in (ONE_TENSOR, with_ddp):
        print(json.dumps({method: train(method, wrapped) for method in ("kd", "dad")}))
    distributed.barrier()
    os._exit(0)
