"""Effective robustness (Taori et al. 2020, arXiv 2007.00644).

Accuracy under a shift minus the accuracy that a line through baseline models predicts. The line is
fitted to their (in-distribution, shifted) accuracies, both on the logit scale.
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
        """Return the accuracy under the shift of a baseline with this in-distribution accuracy.

        Both in percent. Not defined for 0 and 100.
        """
        return 100 / (1 + math.exp(-(self.slope * logit(accuracy) + self.intercept)))


def logit(percent: float) -> float:
    return math.log(percent / (100 - percent))


def fit(pairs: Sequence[tuple[float, float]]) -> Line | None:
    """Fit a least-squares line to pairs of (in-distribution, shifted) accuracy in percent.

    Pairs with 0 or 100 have no logit and are left out. None where fewer than three remain, or all
    have the same in-distribution accuracy.
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
    """Return expected accuracy and effective robustness of every suite of the baselines.

    baselines: accuracy in percent by suite, of each model. top1: the same of the evaluated model.
    id_suite: the in-distribution suite. Raises DataError where no line can be fitted.
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
                f"--baselines: {have}, too few or too alike for a line; "
                "it takes three that differ, not 0 or 100 %"
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
            f"--baselines: no suite other than {id_suite} in it "
            f"(it has {some(map(shown, known))}); name its columns as --suite does"
        )
    return found


def read_baselines(path: str | Path) -> list[dict[str, float]]:
    """Read a CSV with a row per model and a column per suite, or a JSON list of such tables.

    Values are top-1 in percent, empty where unknown. Raises DataError that names the file and
    place.
    """
    where = f"--baselines {shown(str(path))}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        is_json = str(path).endswith(".json")
        rows = json.loads(text) if is_json else list(csv.DictReader(text.splitlines()))
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
                f"{where}, baseline {number}: {shown(str(suite))} is {shown(str(value))[:40]!r}, "
                "not an accuracy"
            ) from None
        if not 0 <= found[str(suite)] <= 100:
            raise DataError(
                f"{where}, baseline {number}: {shown(str(suite))} is {found[str(suite)]:g}, "
                "not an accuracy in percent"
            )
    return found
