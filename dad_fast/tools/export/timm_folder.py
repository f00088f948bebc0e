"""Export a student as timm's own files: `model.safetensors` and `config.json`, the layout of timm's
models on the Hugging Face hub.

    timm.create_model("local-dir:DIR", pretrained=True) timm.create_model(NAME, pretrained=True,
    pretrained_cfg_overlay={**config["pretrained_cfg"], "file": "DIR/model.safetensors"}, ...)

`pretrained_cfg` holds the student's own normalisation, crop and filter, so timm's transform equals
the one of `dad-fast`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dad_fast.data.classes import ClassMap
from dad_fast.errors import UsageError
from dad_fast.models.student import Student, save_student
from dad_fast.models.weights.declared import TEMPERATURE
from dad_fast.models.weights.timm_files import classifier_keys

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Facts about the weights that timm registered under this name, not about the student's.
OF_REGISTERED_WEIGHTS = ("license", "notes", "origin_url", "paper_ids", "paper_name", "tag")


def write_timm(
    folder: Path, student: Student, classes: ClassMap, metadata: Mapping[str, str]
) -> None:
    """Write `model.safetensors` (with `metadata`) and `config.json` into `folder`.

    The temperature of a calibrated student goes into the weights of its classifier, since timm
    knows no temperature.
    """
    if student.calibration is not None:
        student = with_temperature_inside(student)
        metadata = {key: text for key, text in metadata.items() if key != TEMPERATURE}
    timm.models.save_for_hf(
        student.model,
        str(folder),
        model_config={
            "label_names": classes.folders,
            "label_descriptions": dict(zip(classes.folders, classes.names, strict=True)),
            "pretrained_cfg": dict.fromkeys(OF_REGISTERED_WEIGHTS),
        },
        safe_serialization=True,
        data_config=preprocessing(student),
    )
    # The same tensors once more: timm writes no metadata, and `load_student` reads it.
    save_student(folder / WEIGHTS, student, metadata)


@torch.no_grad()
def with_temperature_inside(student: Student) -> Student:
    """Return a copy whose classifier's weights are divided by the temperature.

    Raises UsageError for a model that names no classifier.
    """
    assert student.calibration is not None
    made = copy.deepcopy(student)
    made.calibration = None
    keys = classifier_keys(made.model)
    if not keys:
        raise UsageError(
            f"--format timm: {student.name} names no classifier that could hold its temperature; "
            "use --format onnx or torch"
        )
    state = made.model.state_dict()
    for key in keys:
        state[key] /= student.calibration.temperature
    return made


def preprocessing(student: Student) -> dict[str, Any]:
    """Return the student's view of an image under timm's names."""
    return {
        "input_size": (3, student.image_size, student.image_size),
        "mean": tuple(student.spec["mean"]),
        "std": tuple(student.spec["std"]),
        "interpolation": student.interpolation,
        "crop_pct": student.crop_pct,
        "crop_mode": "squash" if student.squashed else "center",
    }


def read_timm(folder: Path) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Load these files with timm in the two ways of the model card; yield a name and a function:
    pixels in [0, 1] -> logits.
    """
    yield (
        "timm local-dir",
        _with_normalisation(timm.create_model(f"local-dir:{folder}", pretrained=True)),
    )

    config = json.loads((folder / CONFIG).read_text())
    overlay = {**config["pretrained_cfg"], "file": str(folder / WEIGHTS)}
    model = timm.create_model(
        config["architecture"],
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **config.get("model_args", {}),
    )
    yield "timm pretrained_cfg_overlay", _with_normalisation(model)


def _with_normalisation(model: nn.Module) -> Callable[[Tensor], Tensor]:
    cfg: Any = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    model.eval()
    return lambda pixels: model((pixels - mean) / std)
