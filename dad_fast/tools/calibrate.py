"""`dad-fast eval --calibrate SPLIT`: fit one temperature and store it in the model's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dad_fast.config import Config
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluation.metrics.temperature import fit_temperature, mean_nll
from dad_fast.evaluation.models import EvalModel
from dad_fast.evaluation.suites.base import EvalSet, as_eval_set
from dad_fast.evaluation.suites.open import open_suites
from dad_fast.locks import lock_folder
from dad_fast.models.student import Calibration
from dad_fast.models.weights.declared import TEMPERATURE
from dad_fast.models.weights.files import read_state_dict, write_safetensors


def open_split(split: str, cfg: Config, subject: EvalModel) -> EvalSet:
    """Open the split to fit on: all of the model's classes compete. Raises UsageError."""
    (suite,) = open_suites((split,), cfg.data, subject.classes, cfg.eval)
    found = as_eval_set(suite.source)
    if suite.corruption or found.columns is not None or found.accepted is not None:
        raise UsageError(
            f"--calibrate {split}: needs clean images with all of the model's classes, such as val"
        )
    return found


@torch.no_grad()
def fit(
    subject: EvalModel,
    eval_set: EvalSet,
    split: str,
    view: View,
    batch_size: int,
    workers: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[Calibration, dict[str, Any]]:
    """Fit the temperature of an uncalibrated model; return it, and facts for the results.

    Images with non-finite logits are left out. Raises DataError where no temperature fits.
    """
    images = eval_set.pieces[0]
    images = images.taken(images.ok)
    logits, labels, done = [], [], 0
    subject.model.eval()
    for batch in EvalLoader(images, view, batch_size, workers):
        logits.append(subject.model(to_pixels(batch.images.to(device))).float().cpu().numpy())
        labels.append(batch.labels.numpy())
        done += len(batch.labels)
        progress(done, len(images))
    z, y = np.concatenate(logits), np.concatenate(labels)
    finite = np.isfinite(z).all(axis=1)
    z, y = z[finite], y[finite]
    try:
        if not len(y):
            raise ValueError("all logits are non-finite")
        temperature = fit_temperature(z, y)
    except ValueError as error:
        raise DataError(f"--calibrate {split}: {error}; take another split") from None
    facts = {
        "split": split,
        "temperature": temperature,
        "num_images": len(y),
        "non_finite": int((~finite).sum()),
        "nll": [mean_nll(z, y), mean_nll(z, y, temperature)],
    }
    return Calibration(temperature, split, len(y)), facts


def store(path: Path, calibration: Calibration) -> None:
    """Write the temperature into the metadata of a model's file; its tensors stay."""
    with lock_folder(path.absolute().parent):
        tensors, metadata = read_state_dict(path)
        write_safetensors(path, tensors, {**metadata, TEMPERATURE: calibration.to_json()})
