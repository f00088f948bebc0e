"""Accuracy by severity of a corruption: curves and a table.

Severities come from suites that cover several (`by_severity`), from suites of single severities
("fog:3"), and from sets of corrupted copies such as ImageNet-C (`by_corruption`).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dad_fast.evaluation.tables import suites
from dad_fast.report.chart import PERCENT, Series, line_chart
from dad_fast.report.looks import TEACHER, Look
from dad_fast.report.markup import details, grid, notes, table
from dad_fast.report.results import of_suite
from dad_fast.report.run_files import number
from dad_fast.report.verdict import mean_top1

NUM_SEVERITIES = 5
# Corruptions from which their mean has a curve of its own.
MIN_FOR_MEAN = 3
# Top-1 by severity; 0 is the clean suite.
Curve = dict[int, float]


def severity_view(record: dict[str, Any], looks: Mapping[str, Look]) -> str:
    """Return charts and a table of top-1 by severity; "" if no suite has several severities."""
    curves = _curves(record)
    if not curves:
        return ""
    means = _means(curves)
    figures = []
    for corruption, by_name in {**means, **curves}.items():
        series = [_series(name, curve, looks) for name, curve in by_name.items()]
        start = min(min(curve) for curve in by_name.values())
        figures.append(line_chart(corruption, "top-1, %", "severity", series, PERCENT, start))

    severities = sorted({one for by in curves.values() for curve in by.values() for one in curve})
    body = [
        [f"{corruption}: {name}", *(_cell(curve.get(severity)) for severity in severities)]
        for corruption, by_name in {**means, **curves}.items()
        for name, curve in by_name.items()
    ]
    header = ["", *("clean" if severity == 0 else str(severity) for severity in severities)]
    lines = ["Means over seeds."]
    if 0 in severities:
        lines.append("Severity 0: the same images without the corruption.")
    numbers = details("Numbers", table(header, body, caption="Top-1 accuracy by severity, in %"))
    return grid(figures) + numbers + notes(lines)


def _curves(record: dict[str, Any]) -> dict[str, dict[str, Curve]]:
    """Return the curve of every group and teacher by corruption; each has two points or more."""
    names = suites(record)
    # Corruptions of the clean suite, and of sets of corrupted copies, which have no clean suite.
    applied: dict[str, dict[str, Curve]] = {}
    stored: dict[str, dict[str, Curve]] = {}
    corrupted = set()
    for suite in names:
        single = re.fullmatch(r"(.+):([1-5])", suite)
        for name, results in of_suite(record, suite):
            by_severity = _mean_curve([result.get("by_severity") for result in results])
            by_corruption = _by_corruption(results)
            if single:
                corrupted.add(suite)
                curve = applied.setdefault(single[1], {}).setdefault(name, {})
                curve[int(single[2])] = mean_top1(results)
            elif by_corruption:
                corrupted.add(suite)
                for corruption, curve in by_corruption.items():
                    stored.setdefault(corruption, {})[name] = curve
            elif by_severity:
                corrupted.add(suite)
                applied.setdefault(suite, {})[name] = by_severity

    base = next((name for name in names if name not in corrupted), None)
    clean: dict[str, float] = {}
    if base is not None:
        clean = {name: mean_top1(results) for name, results in of_suite(record, base)}
    found = dict(stored)
    for corruption, by_name in applied.items():
        found[corruption] = {
            name: ({0: clean[name]} if name in clean else {}) | curve
            for name, curve in by_name.items()
            if len(curve) > 1
        }
    return {corruption: by_name for corruption, by_name in found.items() if by_name}


def _by_corruption(results: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """Return the curves of the corruptions that have all severities."""
    tables = [_table(result.get("by_corruption")) for result in results]
    curves = {}
    for corruption in tables[0]:
        curve = _mean_curve([_table(one.get(corruption)).get("top1") for one in tables])
        if len(curve) == NUM_SEVERITIES:
            curves[corruption] = curve
    return curves


def _means(curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, dict[str, Curve]]:
    """Return the mean curve of each name over all corruptions, if it has them all alike."""
    if len(curves) < MIN_FOR_MEAN:
        return {}
    first = next(iter(curves.values()))
    means = {}
    for name in first:
        found = [by_name.get(name, {}) for by_name in curves.values()]
        if all(one.keys() == found[0].keys() for one in found):
            means[name] = {
                severity: statistics.fmean(one[severity] for one in found) for severity in found[0]
            }
    return {f"mean of {len(curves)} corruptions": means} if means else {}


def _mean_curve(recorded: Sequence[Any]) -> Curve:
    """Return the mean over seeds of lists of top-1 from severity 1 on; {} if one is unusable."""
    columns = []
    for values in recorded:
        found = values if isinstance(values, list | tuple) else []
        columns.append([number({"value": value}, "value") for value in found])
    if len({len(column) for column in columns}) != 1 or len(columns[0]) < 2:
        return {}
    curve = {}
    for severity, same in enumerate(zip(*columns, strict=True), start=1):
        known = [value for value in same if value is not None]
        if len(known) < len(columns):
            return {}
        curve[severity] = statistics.fmean(known)
    return curve


def _series(name: str, curve: Curve, looks: Mapping[str, Look]) -> Series:
    color, dashes = looks.get(name, TEACHER)
    points = sorted(curve.items())
    marks = [(point, f"{name}: {point[1]:.1f} % at severity {point[0]}") for point in points]
    return Series(name, color, points, dashes, marks)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
