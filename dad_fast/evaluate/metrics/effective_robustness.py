"""Effective robustness (Taori et al. 2020, arXiv 2007.00644): accuracy under a shift beyond what accuracy without it predicts.

The prediction is a line through the (in-distribution, shifted) accuracies of baseline models, both on the logit scale.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dad_fast.data.sources.names import shown, some
from dad_fast.errors import DataError


class Line(NamedTuple):
    """logit(shifted) = slope * logit(in-distribution) + intercept."""

    slope: float
    intercept: float
    r2: float
    num_baselines: int

    def expected(self, accuracy: float) -> float:
        """Accuracy under the shift that a baseline of this in-distribution accuracy would have; both in percent, not 0 or 100."""
        return 100 / (1 + math.exp(-(self.slope * logit(accuracy) + self.intercept)))


def logit(percent: float) -> float:
    return math.log(percent / (100 - percent))


def fit(pairs: Sequence[tuple[float, float]]) -> Line | None:
    """The least-squares line through (in-distribution, shifted) accuracies in percent. Pairs with 0 or 100 have no logit and are left
    out; None where fewer than three remain, or all have the same in-distribution accuracy.
    """
    kept = [(logit(a), logit(b)) for a, b in pairs if 0 < a < 100 and 0 < b < 100]
    if len(kept) < 3 or len({a for a, _ in kept}) == 1:
        return None
    x, y = np.array(kept).T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    intercept = float(y.mean() - slope * x.mean())
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - slope * x - intercept) ** 2).sum())
    return Line(slope, intercept, 1 - left / spread if spread else 1.0, len(kept))


def effective_robustness(
    baselines: Sequence[Mapping[str, float]], top1: Mapping[str, float], id_suite: str
) -> dict[str, dict[str, Any]]:
    """For every suite that the baselines know besides `id_suite`: what the line expects, and how much the model has beyond it, in points.

    baselines: accuracy in percent by suite, of each model. top1: the judged model's. Raises DataError where no line can be fitted.
    """
    found = {}
    for suite, accuracy in top1.items():
        pairs = [
            (one[id_suite], one[suite]) for one in baselines if id_suite in one and suite in one
        ]
        if suite == id_suite or not pairs:
            continue
        line = fit(pairs)
        if line is None:
            have = f"{len(pairs)} baselines have {id_suite} and {suite}"
            raise DataError(
                f"--baselines: {have}, too few or too alike for a line (three that differ, not 0 or 100 %)"
            )
        expected = line.expected(top1[id_suite]) if 0 < top1[id_suite] < 100 else None
        effective = None if expected is None else accuracy - expected
        found[suite] = {
            "id": id_suite,
            "expected": expected,
            "effective": effective,
            **line._asdict(),
        }
    if not found:
        known = sorted({suite for one in baselines for suite in one})
        raise DataError(
            f"--baselines: no suite beside {id_suite} is in it (it has {some(map(shown, known))}); name its columns as --suite does"
        )
    return found


def read_baselines(path: str | Path) -> list[dict[str, float]]:
    """A CSV with a row a model and a column a suite, or a JSON list of such tables: top-1 in percent, empty where unknown.

    Raises DataError that names the file and the place.
    """
    where = f"--baselines {shown(str(path))}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = (
            json.loads(text)
            if str(path).endswith(".json")
            else list(csv.DictReader(text.splitlines()))
        )
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{where}: not a readable table ({' '.join(str(error).split())})") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{where}: needs a row for each baseline and a column for each suite, top-1 in percent"
        )
    return [_accuracies(where, number, row) for number, row in enumerate(rows, start=1)]


def _accuracies(where: str, number: int, row: Mapping[Any, Any]) -> dict[str, float]:
    found = {}
    for suite, value in row.items():
        if suite == "model" or value in ("", None):
            continue
        try:
            found[str(suite)] = float(value)
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                f"{where}, baseline {number}: {shown(str(suite))} is {shown(str(value))[:40]!r}, not an accuracy"
            ) from None
        if not 0 <= found[str(suite)] <= 100:
            raise DataError(
                f"{where}, baseline {number}: {shown(str(suite))} is {found[str(suite)]:g}, not an accuracy in percent"
            )
    return found
