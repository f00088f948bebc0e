"""Linear heads of files for a teacher's encoder: a linear probe of this project, or a fine-tuned
head.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError
from dad_fast.models.weights.declared import PROBE, check_classes, check_encoder, probe_spec
from dad_fast.models.weights.files import fingerprint, read_state_dict

# How to get a head, for errors
FIT_ONE = (
    "fit one: train --method lp-clip --lp-labels true with this --teacher, then add --teacher-head "
    "RUN/model.safetensors"
)


class LinearHead(NamedTuple):
    """weight [C, F], bias [C]; unit_features: the features are normalised before the head."""

    weight: Tensor
    bias: Tensor
    unit_features: bool


def read_head(
    path: str, classes: ClassMap, encoder: nn.Module, num_features: int, image_size: int
) -> LinearHead:
    """Read a linear head: weight [C, F], bias [C] (optional), and its class list (optional).

    The file is a fine-tuned head on unnormalised features, or a linear probe of the same encoder,
    which records its features. num_features, image_size: of `encoder`. Raises DataError for a head
    of other classes, features or weights of the encoder, and for one fitted at another input size.
    """
    where = f"--teacher-head {path}"
    state, metadata = read_state_dict(path)
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise DataError(
            f"{where}: needs a tensor weight [classes, features], and optionally bias [classes]"
        )
    if weight.shape[0] != len(classes):
        raise DataError(
            f"{where}: it has {weight.shape[0]} outputs, the data {len(classes)} classes; give its "
            "--class-map"
        )
    check_classes(where, metadata, classes)
    if num_features != weight.shape[1]:
        raise DataError(
            f"{where}: it takes {weight.shape[1]} features, the teacher has {num_features}; give "
            "this teacher's head"
        )
    unit_features = False
    if PROBE in metadata:
        spec = probe_spec(Path(path), metadata)
        fitted_at = spec["encoder_size"]
        if fitted_at not in (0, image_size):
            raise DataError(
                f"{where}: fitted to the encoder at {fitted_at} px, which here runs at "
                f"{image_size}; add --teacher-img-size {fitted_at}"
            )
        check_encoder(path, spec, fingerprint(encoder))
        unit_features = spec["unit_features"]
    bias = torch.zeros(len(classes)) if bias is None else bias.float()
    return LinearHead(weight.float(), bias, unit_features)
