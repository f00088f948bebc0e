"""A student as timm's own files: `model.safetensors` and `config.json` in the layout of timm's models on the Hugging Face hub.

    timm.create_model("local-dir:DIR", pretrained=True)
    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={**config["pretrained_cfg"], "file": "DIR/model.safetensors"}, ...)

`pretrained_cfg` holds the student's own normalisation, crop and filter, so that timm's transform shows it what `dad-fast` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dad_fast.data.classes import ClassMap
from dad_fast.files import atomic_write_json
from dad_fast.models.student import Student, save_student

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Facts about the architecture, which timm's builder reads; the rest of a registered model's configuration is about its own weights.
ARCHITECTURE = ("first_conv", "classifier", "fixed_input_size")


def write_timm(
    folder: Path, student: Student, classes: ClassMap, metadata: Mapping[str, str]
) -> None:
    """Write `model.safetensors` (with `metadata`) and `config.json` into `folder`."""
    save_student(folder / WEIGHTS, student, metadata)
    atomic_write_json(folder / CONFIG, timm_config(student, classes))


def timm_config(student: Student, classes: ClassMap) -> dict[str, Any]:
    """What timm needs to build the student: architecture, its arguments, `pretrained_cfg`, and the classes' names."""
    own: dict[str, Any] = getattr(student.model, "pretrained_cfg", {})
    side = student.image_size
    arguments = dict(student.spec["model_kwargs"])
    if not own.get("fixed_input_size") and _takes_size(student):
        arguments["img_size"] = side  # a model with a fixed input takes it from input_size
    base = student.name.partition(".")[0]
    return {
        "architecture": base,
        "num_classes": student.num_classes,
        "num_features": getattr(student.model, "num_features", None),
        "label_names": classes.folders,
        "label_descriptions": dict(zip(classes.folders, classes.names, strict=True)),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            **{key: own[key] for key in ARCHITECTURE if own.get(key) is not None},
            "custom_load": False,
            "input_size": [3, side, side],
            **dict.fromkeys(
                ("pool_size", "test_input_size", "test_crop_pct")
            ),  # of the registered model, at its own size
            "crop_mode": "center",
            "interpolation": student.interpolation,
            "crop_pct": student.crop_pct,
            "mean": student.spec["mean"],
            "std": student.spec["std"],
            "num_classes": student.num_classes,
        },
    }


def _takes_size(student: Student) -> bool:
    """Whether timm's constructor of this model takes `img_size`."""
    try:
        with torch.device("meta"):
            timm.create_model(
                student.name,
                img_size=student.image_size,
                num_classes=1,
                **student.spec["model_kwargs"],
            )
    except TypeError as error:
        return "img_size" not in str(error)
    except Exception:  # it needs values while it is built; a student of its size was built before
        return True
    return True


def read_timm(folder: Path) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """What timm makes of these files, in the two ways that the model card shows: name, and pixels in [0, 1] -> logits."""
    yield (
        "timm local-dir",
        _with_its_normalisation(timm.create_model(f"local-dir:{folder}", pretrained=True)),
    )
    config = json.loads((folder / CONFIG).read_text())
    overlay = {**config["pretrained_cfg"], "file": str(folder / WEIGHTS)}
    arguments = config.get("model_args", {})
    model = timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **arguments
    )
    yield "timm pretrained_cfg_overlay", _with_its_normalisation(model)


def _with_its_normalisation(model: nn.Module) -> Callable[[Tensor], Tensor]:
    said: Any = model.pretrained_cfg
    mean, std = (torch.tensor(said[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    model.eval()
    return lambda pixels: model((pixels - mean) / std)
