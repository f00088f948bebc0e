"""AdamW's step in each implementation, on the parameters of the students of the size.

Implementations: one tensor after the other, foreach, fused, and NVIDIA apex's if installed (not yet
run). Bytes: an update reads the weight, its gradient and two moments, and writes all but the
gradient: 28 bytes a parameter. foreach passes over memory about a dozen times. engine/update.py
follows these records: fused if the optimizer has it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import timm
import torch

from benchmarks.bench import Bench
from dad_fast.engine.optimizer import apex_problem

STUDENTS = {
    "tiny": ("resnet18", "vit_tiny_patch16_224"),
    "base": ("resnet50", "vit_small_patch16_224"),
    "paper": ("resnet50", "vit_base_patch16_224"),
}
BYTES = 28


@pytest.mark.parametrize("number", [0, 1])
def test_adamw(bench: Bench, number: int) -> None:
    name = STUDENTS[bench.size][number]
    model = timm.create_model(name).to(bench.device)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    functions: dict[str, Callable[[], object]] = {}
    for way in ({"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}):
        label = next((key for key, on in way.items() if on), "one by one")
        capturable = {"capturable": True} if bench.device.type == "cuda" else {}
        functions[label] = torch.optim.AdamW(
            parameters, lr=1e-6, weight_decay=0.05, **way, **capturable
        ).step
    if bench.device.type == "cuda" and not apex_problem()[0]:
        functions["apex"] = (
            import_module("apex.optimizers")
            .FusedAdam(parameters, lr=1e-6, weight_decay=0.05, adam_w_mode=True)
            .step
        )
    count = sum(parameter.numel() for parameter in parameters)
    config = {
        "student": name,
        "parameters": count,
        "tensors": len(parameters),
        "bytes_if_fused": BYTES * count,
    }
    bench.compare(
        f"AdamW, {name}",
        functions,
        baseline="foreach",
        work=count / 1e6,
        unit="M parameters",
        config=config,
    )
