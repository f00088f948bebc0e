"""Images of the report's picture sheet: `sheet.safetensors` in a run's folder.

    original, discretized, adversarial   uint8 [N, H, W, 3]     x, Q(x), Q(x + δ)
    difference                           uint8 [N, H, W, 3]     127.5 (1 + scale (Q(x + δ) - Q(x))),
                                                                taken before rounding to uint8
    shift                                float32 [N, h, w]      distance in the codebook from the
                                                                code of Q(x) to that of Q(x + δ),
                                                                0 if it did not change; absent if
                                                                the discretizer has no codes
    metadata "dad_fast.sheet"            JSON: scale, num_codes, attacked,
                                               examples [{label, answer, kept, filtered}]

Reading needs numpy alone, so that `dad-fast report` does not import torch.
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
    """Contents of `sheet.safetensors`; see the module."""

    images: Mapping[str, np.ndarray]  # by the names in IMAGES
    shift: np.ndarray | None
    scale: int
    num_codes: int  # size of the codebook, 0 without one
    attacked: str  # name of the attacked model
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

    original, discretized, adversarial: [N, 3, H, W] in [0, 1], on any device
    shift: [N, h, w] or None
    examples: N times {"label": the true class, "answer": the class that `attacked` predicts for
    the adversarial image, "kept": whether it passed the filter, "filtered": whether the run has
    a filter}
    """
    from safetensors.torch import save

    difference = 0.5 + scale * (adversarial.float() - discretized.float()) / 2
    parts = (original, discretized, adversarial, difference)
    tensors = {name: _levels(part) for name, part in zip(IMAGES, parts, strict=True)}
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

    levels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().contiguous()


def read_pieces(path: str | Path) -> Pieces:
    """Read the pieces. Raises DataError for a file that `write_pieces` did not write."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            described = json.loads((file.metadata() or {})[METADATA])
            images = {name: file.get_tensor(name) for name in IMAGES}
            names = file.keys()
            shift = file.get_tensor("shift") if "shift" in names else None
        pieces = Pieces(
            images,
            shift,
            int(described["scale"]),
            int(described["num_codes"]),
            str(described["attacked"]),
            described["examples"],
        )
        if not _is_consistent(pieces):
            raise ValueError("shapes or types do not match")
        return pieces
    except (
        OSError,
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        # A type that numpy lacks.
        AttributeError,
    ) as error:
        raise DataError(f"{path}: not the pieces of a picture sheet ({error})") from None


def _is_consistent(pieces: Pieces) -> bool:
    count = len(pieces.examples)
    shape = pieces.images["original"].shape
    if len(shape) != 4 or min(shape) == 0 or shape[0] != count or shape[3] != 3:
        return False
    if any(part.shape != shape or part.dtype != np.uint8 for part in pieces.images.values()):
        return False
    if not all(isinstance(example, dict) for example in pieces.examples):
        return False

    shift = pieces.shift
    if shift is None:
        return True
    return bool(shift.ndim == 3 and len(shift) == count and shift.size and np.isfinite(shift).all())
