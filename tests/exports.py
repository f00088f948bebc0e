"""Students to export in tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")
np = pytest.importorskip("numpy")

from dad_fast.cli import main as cli
from dad_fast.config.schema import StudentConfig
from dad_fast.data.classes import ClassMap
from dad_fast.models.student import Student, build_student, save_student
from dad_fast.tools.export import graph as export_graph
from tests.tiny import SIDE

NAMES = ("ant", "bee <b>|`x`", "c\x1b[31md")
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet": {
        "name": "resnet18",
        "model_kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
    },
    "vit": {
        "name": "vit_tiny_patch16_224",
        "model_kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8},
    },
}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export_graph.PACKAGES),
    reason="needs onnx, onnxscript, onnxruntime",
)


def make(path: Path, kind: str = "resnet", ema: bool = True, seed: int = 0) -> Student:
    torch.manual_seed(seed)
    student = build_student(StudentConfig(**STUDENTS[kind]), len(NAMES), SIDE)
    with torch.no_grad():
        student(torch.rand(8, 3, SIDE, SIDE))  # batch norm has seen something
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    classes = ClassMap(tuple((i, f"folder{i}", name) for i, name in enumerate(NAMES)))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "dad_fast.classes": classes.to_json(),
        "dad_fast.method": "dad",
        "dad_fast.ema": str(ema).lower(),
    }
    save_student(path, student, metadata)
    return student.eval()


def export(*arguments: Any) -> int:
    return cli.main(["export", *map(str, arguments)])
