"""The weights that the optimizer steps, where a run keeps an average of them (EMA): only checkpoints hold them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dad_fast.errors import DataError
from dad_fast.models.student import Student, checkpoint_file, load_student
from dad_fast.models.weights.files import load_strictly, sha256_file

TENSORS, STATE, PREFIX = "train.safetensors", "state.json", "student.model."


def load_raw_student(path: str | Path) -> tuple[Student, dict[str, str], Path]:
    """The student with its raw weights, in eval mode, the metadata of the model beside them, and the checkpoint that they are from.

    `path` is a checkpoint's folder, or a run's folder or its model.safetensors, which stand for the run's latest checkpoint. Raises
    DataError where there is no checkpoint or where it is damaged.
    """
    folder = _checkpoint_of(checkpoint_file(path).parent)
    student, metadata = load_student(folder / "model.safetensors")
    load_strictly(student.model, _read(folder / TENSORS), folder / TENSORS)
    return student, metadata, folder


def _checkpoint_of(folder: Path) -> Path:
    for candidate in (folder, folder / "checkpoints" / "latest"):
        if (candidate / TENSORS).is_file():
            return candidate.resolve()
    raise DataError(
        f"{folder}: no checkpoint here ({TENSORS} or checkpoints/latest), and only checkpoints hold raw weights; name one"
    )


def _read(path: Path) -> dict[str, Tensor]:
    """The student's tensors of a checkpoint, without its auxiliary batch norms, once its hash has been compared."""
    try:
        digest = json.loads((path.parent / STATE).read_text())["sha256"][TENSORS]
        if sha256_file(path) != digest:
            raise DataError(
                f"{path}: damaged, it is not what was written; name an earlier checkpoint"
            )
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(PREFIX) and ".aux_bn." not in key]
            return {key.removeprefix(PREFIX): file.get_tensor(key) for key in keys}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); name another checkpoint"
        ) from None
