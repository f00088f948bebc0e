"""What the report shows of discretization and attack, image by image: `sheet.safetensors` in a run's folder.

    original, discretized, adversarial   uint8 [N, H, W, 3]     x, Q(x), Q(x + δ)
    difference                           uint8 [N, H, W, 3]     127.5 (1 + scale (Q(x + δ) - Q(x))), taken before rounding to uint8
    shift                                float32 [N, h, w]      distance from the code of Q(x) to that of Q(x + δ) in the codebook,
                                                                0 where it stayed; absent where the discretizer has no codes
    metadata "dad_fast.sheet"            JSON: scale, num_codes, attacked, examples [{label, answer, kept, filtered}]

Reading needs numpy alone, so that a report is made without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dad_fast.errors import DataError
from dad_fast.files import atomic_write_bytes

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = ("original", "discretized", "adversarial", "difference")
METADATA = "dad_fast.sheet"


@dataclass(frozen=True)
class Pieces:
    """What `sheet.safetensors` holds; see the module."""

    images: Mapping[str, np.ndarray]  # by the names in IMAGES
    shift: np.ndarray | None
    scale: int
    num_codes: int  # size of the codebook, 0 without one
    attacked: str  # name of the model that the attack is on
    examples: Sequence[Mapping[str, Any]]


def write_pieces(
    path: str | Path,
    original: Tensor,
    discretized: Tensor,
    adversarial: Tensor,
    *,
    scale: int,
    examples: Sequence[Mapping[str, Any]],
    attacked: str,
    shift: Tensor | None = None,
    num_codes: int = 0,
) -> None:
    """Write the file that `read_pieces` reads.

    original, discretized, adversarial: [N, 3, H, W] in [0, 1], on any device; shift: [N, h, w] or None
    examples: N times {"label": the true class, "answer": what `attacked` says of the adversarial image, "kept": whether it passed
    the filter, "filtered": whether the run has a filter}
    """
    from safetensors.torch import save

    difference = 0.5 + scale * (adversarial.float() - discretized.float()) / 2
    tensors = {
        name: _levels(part)
        for name, part in zip(IMAGES, (original, discretized, adversarial, difference), strict=True)
    }
    if shift is not None:
        tensors["shift"] = shift.detach().float().cpu().contiguous()
    described = {
        "scale": scale,
        "num_codes": num_codes,
        "attacked": attacked,
        "examples": list(examples),
    }
    atomic_write_bytes(path, save(tensors, {METADATA: json.dumps(described)}))


def _levels(images: Tensor) -> Tensor:
    import torch

    return (
        (images.detach().float().clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .cpu()
        .contiguous()
    )


def read_pieces(path: str | Path) -> Pieces:
    """Raises DataError for a file that is not what `write_pieces` writes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            described = json.loads((file.metadata() or {})[METADATA])
            images = {name: file.get_tensor(name) for name in IMAGES}
            shift = file.get_tensor("shift") if "shift" in file.keys() else None
        shape = images["original"].shape
        sound = (
            len(shape) == 4
            and min(shape) > 0
            and shape[3] == 3
            and all(part.shape == shape and part.dtype == np.uint8 for part in images.values())
        )
        count = len(described["examples"])
        sound = (
            sound
            and shape[0] == count
            and all(isinstance(one, dict) for one in described["examples"])
        )
        if not sound or (
            shift is not None
            and (
                shift.ndim != 3
                or len(shift) != count
                or not shift.size
                or not np.isfinite(shift).all()
            )
        ):
            raise ValueError("shapes or types that do not belong together")
        return Pieces(
            images,
            shift,
            int(described["scale"]),
            int(described["num_codes"]),
            str(described["attacked"]),
            described["examples"],
        )
    except (
        OSError,
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # the last: a type that numpy lacks
        raise DataError(f"{path}: not the pieces of a picture sheet ({error})") from None
