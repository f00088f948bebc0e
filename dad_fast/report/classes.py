"""Classes of the report: accuracy of each class, most confused pairs, confusion matrices."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dad_fast.evaluation.tables import suites
from dad_fast.report.looks import TEACHER, Look
from dad_fast.report.markup import details, grid, notes, table
from dad_fast.report.matrix import MAX_CLASSES, matrix_chart
from dad_fast.report.results import of_suite
from dad_fast.report.run_files import number

# Rows of a table of classes; of more classes, the least accurate are shown.
MAX_ROWS = 40
MAX_PAIRS = 10
# Length of all matrices of a page in bytes, and of a class number in digits.
MATRIX_BYTES = 400_000
MAX_DIGITS = 6


@dataclass
class Confusion:
    """Sum over seeds of `evaluate.metrics.confusion`, with classes as numbers.

    images: of each label. is_all: whether `wrong` has every wrong prediction.
    """

    images: Counter[int] = field(default_factory=Counter)
    wrong: Counter[tuple[int, int]] = field(default_factory=Counter)
    is_all: bool = True

    def share(self, label: int, prediction: int) -> float | None:
        """Return the share of the label's images with this prediction; None if not recorded."""
        count = self.wrong.get((label, prediction))
        if label not in self.images or (count is None and not self.is_all):
            return None
        return (count or 0) / self.images[label]


def classes_view(record: dict[str, Any], looks: Mapping[str, Look]) -> str:
    """Return the tables and matrices of each suite, folded but for the first; "" without any."""
    names = class_names(record)
    parts: list[str] = []
    budget = MATRIX_BYTES
    for suite in suites(record):
        models = of_suite(record, suite)
        accuracy = _accuracy_table(models, names)
        read = {name: read_confusion(results) for name, results in models}
        confusions = {name: found for name, found in read.items() if found is not None}
        pairs = _pairs_table(confusions, names)
        matrices = _matrices(confusions, names, looks)
        if len(matrices) <= budget:
            budget -= len(matrices)
        else:
            matrices = notes(["Left out, to keep the page small."])
        content = accuracy + pairs + details("Confusion matrices", matrices)
        if content:
            parts.append(details(suite, content, is_open=not parts))
    return "".join(parts)


def class_names(record: dict[str, Any]) -> list[str]:
    """Return the names of the classes that the runs recorded; [] if they differ or have none."""
    found = [run["classes"] for run in record["runs"] if isinstance(run.get("classes"), list)]
    if not found or any(one != found[0] for one in found):
        return []
    return [str(name) for name in found[0]]


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def _accuracy_table(
    models: Sequence[tuple[str, Sequence[dict[str, Any]]]], names: Sequence[str]
) -> str:
    read = {name: _per_class(results) for name, results in models}
    means = {name: found for name, found in read.items() if found is not None}
    sizes = {len(found) for found in means.values()}
    if len(sizes) != 1:
        return ""
    rows = []
    for label in range(sizes.pop()):
        values = [found[label] for found in means.values()]
        known = [value for value in values if value is not None]
        if known:
            rows.append((statistics.fmean(known), label, values))
    caption = "Accuracy of each class, in %"
    if len(rows) > MAX_ROWS:
        caption = f"Accuracy of the {MAX_ROWS} least accurate of {len(rows)} classes, in %"
        rows = sorted(rows)[:MAX_ROWS]
    body = [
        [_name(names, label), *("–" if value is None else f"{value:.1f}" for value in values)]
        for _, label, values in rows
    ]
    return table(["", *means], body, caption=caption) if body else ""


def _per_class(results: Sequence[dict[str, Any]]) -> list[float | None] | None:
    """Return the mean over seeds of each class's accuracy; None if a seed has no usable list."""
    recorded = [result.get("per_class") for result in results]
    columns = [column for column in recorded if isinstance(column, list) and column]
    if len(columns) < len(recorded) or len({len(column) for column in columns}) != 1:
        return None
    found: list[float | None] = []
    for same in zip(*columns, strict=True):
        values = [number({"value": value}, "value") for value in same]
        known = [value for value in values if value is not None]
        found.append(statistics.fmean(known) if known else None)
    return found


def read_confusion(results: Sequence[dict[str, Any]]) -> Confusion | None:
    """Return the sum over seeds; None if a seed has no usable confusion."""
    found = Confusion()
    for result in results:
        recorded = result.get("confusion")
        if not isinstance(recorded, dict):
            return None
        try:
            found.is_all &= bool(recorded["all"])
            for label, images in recorded["images"].items():
                found.images[_class(label)] += _count(images)
            for label, predictions in recorded["wrong"].items():
                for prediction, images in predictions.items():
                    found.wrong[_class(label), _class(prediction)] += _count(images)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
    return found if found.images else None


def _class(text: Any) -> int:
    if not isinstance(text, str) or not text.isdecimal() or len(text) > MAX_DIGITS:
        raise ValueError(f"no class number: {text!r}")
    return int(text)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1e12:
        raise ValueError(f"no number of images: {value!r}")
    return value


def _pairs_table(confusions: Mapping[str, Confusion], names: Sequence[str]) -> str:
    """Return the pairs that are confused most often, over all models, and each model's share."""
    rates: dict[tuple[int, int], list[float | None]] = {}
    for confusion in confusions.values():
        for pair in confusion.wrong:
            rates.setdefault(pair, [one.share(*pair) for one in confusions.values()])

    def mean(pair: tuple[int, int]) -> float:
        return math.fsum(rate or 0.0 for rate in rates[pair]) / len(confusions)

    pairs = sorted(rates, key=lambda pair: (-mean(pair), pair))[:MAX_PAIRS]
    body = []
    for label, prediction in pairs:
        shares = rates[label, prediction]
        cells = ["–" if share is None else f"{100 * share:.1f}" for share in shares]
        body.append([f"{_name(names, label)} → {_name(names, prediction)}", *cells])
    caption = "Most confused: class → prediction, in % of the class's images"
    return table(["", *confusions], body, caption=caption) if body else ""


def _matrices(
    confusions: Mapping[str, Confusion], names: Sequence[str], looks: Mapping[str, Look]
) -> str:
    figures = []
    for name, confusion in confusions.items():
        classes = sorted({*confusion.images, *(one for pair in confusion.wrong for one in pair)})
        if not confusion.is_all or not 2 <= len(classes) <= MAX_CLASSES:
            continue
        place = {label: i for i, label in enumerate(classes)}
        right = dict.fromkeys(confusion.images, 1.0)
        shares: dict[tuple[int, int], float] = {}
        for label, prediction in confusion.wrong:
            share = confusion.share(label, prediction)
            if share is not None:
                shares[place[label], place[prediction]] = share
                right[label] -= share
        shares |= {(place[label], place[label]): share for label, share in right.items()}
        labels = [_name(names, label) for label in classes]
        figures.append(matrix_chart(name, labels, shares, looks.get(name, TEACHER)[0]))
    lines = [
        "Rows: the class; columns: the prediction; in % of the row's images. Summed over seeds."
    ]
    return grid(figures) + notes(lines) if figures else ""
