"""Load a trained student: final weights, raw weights of a checkpoint, settings of its run."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dad_fast.config import Config
from dad_fast.errors import DataError
from dad_fast.models.places import STATE, TENSORS, checkpoint_file
from dad_fast.models.probe import load_probe
from dad_fast.models.student import Calibration, Student, read_student
from dad_fast.models.weights.declared import PROBE, STUDENT
from dad_fast.models.weights.files import load_strictly, read_state_dict, sha256_file

# Files of a checkpoint, and the prefix of the student's tensors in them
PREFIX = "student.model."


def load_student(path: str | Path) -> tuple[Student, dict[str, str]]:
    """Load a student, in eval mode, and its metadata from a file, a run or a checkpoint folder.

    A linear probe comes with its encoder, as one model. Nothing that a file names is downloaded or
    executed. Raises DataError for a file that is damaged or is not a student.
    """
    path = checkpoint_file(path)
    state, metadata = read_state_dict(path)
    if PROBE not in metadata and STUDENT not in metadata:
        raise DataError(
            f"{path}: not a student of dad-fast (no {STUDENT} in its metadata); name a run's "
            "folder or its model.safetensors"
        )
    read = load_probe if PROBE in metadata else read_student
    student = read(path, state, metadata)
    student.calibration = Calibration.from_metadata(path, metadata)
    return student, metadata


def load_raw_student(path: str | Path) -> tuple[Student, dict[str, str], Path]:
    """Load a student with the raw weights of a checkpoint, not their average (EMA).

    `path` is a checkpoint's folder, or a run's folder or its model.safetensors, which stand for the
    latest checkpoint. Returns the student in eval mode, the metadata of the model next to the raw
    weights, and the checkpoint's folder. Raises DataError if there is no checkpoint or if it is
    damaged.
    """
    folder = _checkpoint_of(checkpoint_file(path).parent)
    student, metadata = load_student(folder / "model.safetensors")
    load_strictly(student.model, _read_raw(folder / TENSORS), folder / TENSORS)
    return student, metadata, folder


def _checkpoint_of(folder: Path) -> Path:
    for candidate in (folder, folder / "checkpoints" / "latest"):
        if (candidate / TENSORS).is_file():
            return candidate.resolve()
    raise DataError(
        f"{folder}: no checkpoint here ({TENSORS} or checkpoints/latest), and only checkpoints "
        "hold raw weights; name one"
    )


def _read_raw(path: Path) -> dict[str, Tensor]:
    """Verify a checkpoint's hash and return the student's tensors without auxiliary batch norms."""
    try:
        digest = json.loads((path.parent / STATE).read_text())["sha256"][TENSORS]
        if sha256_file(path) != digest:
            raise DataError(
                f"{path}: damaged, its content has changed since it was written; name an earlier "
                "checkpoint"
            )
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(PREFIX) and ".aux_bn." not in key]
            return {key.removeprefix(PREFIX): file.get_tensor(key) for key in keys}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); name another checkpoint"
        ) from None


def take_view(student: Student, cfg: Config | None) -> None:
    """Set the student's evaluation crop and interpolation to those of its run, for its file.

    A loaded student needs this only if its file was written by an older version.
    """
    if cfg is not None:
        student.crop_pct = cfg.augment.crop_pct or student.crop_pct
        student.interpolation = cfg.augment.interpolation or student.interpolation
        student.spec |= {"crop_pct": student.crop_pct, "interpolation": student.interpolation}
