"""Where a run keeps its weights and settings. Imports no torch, so that paths are checked first."""

from __future__ import annotations

from pathlib import Path

from dad_fast.config import Config, from_toml
from dad_fast.errors import DataError
from dad_fast.files import read_text

# Files of a checkpoint next to its model.safetensors
TENSORS = "train.safetensors"
STATE = "state.json"


def checkpoint_file(path: str | Path) -> Path:
    """Return the weights file of `path`: a file, a checkpoint folder or a run's folder.

    A run's folder gives its final model, else its latest checkpoint. Raises DataError without one.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        runs = _runs_in(path.parent)
        # Several seeds of one method lie in OUT/METHOD/seed-S, not in OUT/seed-S.
        alike = [run for run in runs if run.name == path.name]
        near = f"{path.parent} has {(alike or runs)[0]}; " if runs else ""
        raise DataError(
            f"{path}: no such checkpoint; {near}"
            "name a run's folder, a checkpoint folder or a weights file"
        )
    for inside in ("model.safetensors", "checkpoints/latest/model.safetensors"):
        if (path / inside).is_file():
            return path / inside
    runs = _runs_in(path)
    several = f"; it holds several runs, such as {runs[0]}" if runs else ""
    raise DataError(f"{path}: no model.safetensors and no checkpoints/latest here{several}")


def _runs_in(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob("*/seed-*/model.safetensors"))


def run_settings(weights: Path) -> tuple[Config | None, Path]:
    """Return the settings of a model's run and the run's folder; None if there is no config.toml.

    The file lies next to the weights, or in the run's folder if the weights are those of a
    checkpoint.
    """
    folder = weights.absolute().parent
    for place in (folder, folder.parent.parent):
        file = place / "config.toml"
        if file.is_file():
            return from_toml(read_text(file), str(file)), place
    return None, folder
