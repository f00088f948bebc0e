"""Records: scores of each image of a suite on the CPU, saved to and loaded from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from dad_fast.data.sources.names import shown
from dad_fast.errors import DataError
from dad_fast.evaluation.metrics.image_scores import SCORES
from dad_fast.evaluation.metrics.record_files import PREDICTIONS
from dad_fast.files import atomic_write_bytes, plain
from dad_fast.models.weights.files import read_state_dict

FIELDS = ("image", "part", "label", *SCORES)


@dataclass(frozen=True, eq=False)
class Records:
    """One row per image and part of the suite (a severity, or a corruption and severity).

    Rows are in the order of parts, then images. values: image and part, int64 [N]; label, int64
    [N], the right output of the model (the first of several, -1 for none); the others, float64 [N],
    see `metrics.image_scores`.
    source: identifies the images: the same source, image and part means the same image.
    """

    source: str
    values: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    def __len__(self) -> int:
        return len(self.values["image"])

    @property
    def scores(self) -> dict[str, np.ndarray]:
        return {name: self.values[name] for name in SCORES}

    def part(self, number: int) -> Records:
        return self.taken(self.values["part"] == number)

    def taken(self, chosen: np.ndarray) -> Records:
        """Return the chosen rows, bool [N]."""
        return Records(self.source, {name: value[chosen] for name, value in self.values.items()})


def save_records(path: str | Path, about: Mapping[str, Any], suites: Mapping[str, Records]) -> None:
    """Write the records of one model as safetensors: arrays SUITE/FIELD and `about` as metadata."""
    arrays = {
        f"{name}/{field}": _small(field, records[field])
        for name, records in suites.items()
        for field in FIELDS
    }
    described = {**about, "suites": {name: records.source for name, records in suites.items()}}
    metadata = {PREDICTIONS: json.dumps(plain(described), ensure_ascii=False)}
    atomic_write_bytes(path, save(arrays, metadata))


def _small(field: str, values: np.ndarray) -> np.ndarray:
    if field in ("correct", "top5"):
        return values.astype(np.uint8)
    return values.astype(np.int32 if field in (*FIELDS[:3], "prediction") else np.float64)


def load_records(path: str | Path) -> tuple[dict[str, Any], dict[str, Records]]:
    """Load a file of `save_records`: `about`, and the records by suite.

    Raises DataError for any other file.
    """
    arrays, metadata = read_state_dict(path)
    try:
        about = json.loads(metadata[PREDICTIONS])
        suites = {}
        for name, source in about["suites"].items():
            if shown(name) != name:
                raise ValueError(f"a suite is called {shown(name)[:40]}")
            found = {field: arrays[f"{name}/{field}"].numpy() for field in FIELDS}
            if len({value.shape for value in found.values()}) != 1 or found["image"].ndim != 1:
                raise ValueError(f"the arrays of {name} differ in shape")
            if any(value.dtype.kind not in "buif" for value in found.values()):
                raise ValueError(f"the arrays of {name} hold complex numbers")
            whole = ("image", "part", "label")
            suites[name] = Records(
                str(source),
                {f: v.astype(np.int64 if f in whole else np.float64) for f, v in found.items()},
            )
    except KeyError as error:
        raise DataError(
            f"{shown(str(path))}: no predictions of dad-fast (no {error}); "
            "name a file of eval --save-predictions"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{shown(str(path))}: its predictions are damaged ({error}); save them again"
        ) from None
    return about, suites
