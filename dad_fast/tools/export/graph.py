"""Export a student as a graph that contains its normalisation: ONNX, or a program of torch.export.

Both take any batch size.
"""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from dad_fast.errors import DadFastError, EnvironmentProblem
from dad_fast.files import atomic_write_bytes
from dad_fast.models.onnx_student import VIEW, OnnxStudent
from dad_fast.models.student import Student

ONNX, PROGRAM = "model.onnx", "model.pt2"
OPSET = 18  # written without conversion, and read by runtimes since 2023
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # writing needs the first two, checking the third
IN_ONE_FILE = 1_800_000_000  # bytes of weights; protobuf ends at 2 GiB


def check_onnx_packages() -> None:
    """Raise EnvironmentProblem, naming the packages that `--format onnx` lacks."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise EnvironmentProblem(
            f"--format onnx needs {', '.join(missing)}: pip install 'dad-fast[export]'"
        )


def trace(student: Student) -> ExportedProgram:
    """Trace the student in float32: pixels [batch, 3, side, side] in [0, 1] -> logits [batch,
    num_classes].
    """
    pixels = torch.rand(
        2, 3, student.image_size, student.image_size, generator=torch.Generator().manual_seed(0)
    )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                student, (pixels,), dynamic_shapes={"pixels": {0: Dim("batch", min=1, max=2**20)}}
            )
    except Exception as error:  # a model's code may raise anything under tracing
        why = " ".join(str(error).split())[:200]
        raise DadFastError(
            f"{student.name} cannot be traced by torch.export ({why}); --format timm does not need "
            "it"
        ) from error
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # contains this machine's paths
    return program


def write_program(path: Path, program: ExportedProgram, metadata: Mapping[str, str]) -> None:
    """Write a file for `torch.export.load`, with `metadata` as JSON in its extra file
    dad_fast.json.
    """
    file = io.BytesIO()  # torch's own writer does not report a full disk
    torch.export.save(program, file, extra_files={"dad_fast.json": json.dumps(dict(metadata))})
    atomic_write_bytes(path, file.getvalue())


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return module


def write_onnx(path: Path, program: ExportedProgram, metadata: Mapping[str, str]) -> None:
    """Write an ONNX file of standard operators only, with `metadata`; above 1.8 GB its weights go
    to `path`.data.

    Raises DadFastError if an operator of another domain is needed.
    """
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes={"pixels": {0: "batch"}},
            verbose=False,
        )
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # names of Python frames and this machine's paths
        node.doc_string = None
    made.model.metadata_props.update(metadata)

    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    made.save(path, external_data=size > IN_ONE_FILE)
    onnx.checker.check_model(str(path))
    found = onnx.load(str(path), load_external_data=False)
    nodes = [*found.graph.node, *(node for function in found.functions for node in function.node)]
    others = {
        f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")
    }
    if others:
        raise DadFastError(
            f"the ONNX graph needs operators outside the standard: {', '.join(sorted(others)[:3])}; "
            "use --format torch"
        )


def view_metadata(student: Student) -> dict[str, str]:
    """Return the metadata of a graph's file that `OnnxStudent` reads."""
    view = {
        "name": student.name,
        "num_classes": student.num_classes,
        "img_size": student.image_size,
        "crop_pct": student.crop_pct,
        "interpolation": student.interpolation,
        "squashed": student.squashed,
    }
    return {VIEW: json.dumps(view)}


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    return OnnxStudent(path)
