"""Curves of the log by step, with the best validation of each run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dad_fast.report.chart import PERCENT, Scale, Series, line_chart
from dad_fast.report.looks import Look
from dad_fast.report.markup import grid, numbers, table
from dad_fast.report.run_files import Run, number
from dad_fast.report.runs import Group

# Noise of a flat curve takes a small part of the chart, whatever the unit.
POSITIVE = Scale(share=0.5, low=0.0)
Points = list[tuple[float, float]]


class Curve(NamedTuple):
    kind: str  # of the rows of metrics.jsonl
    value: str  # key in the row
    factor: float
    heading: str
    unit: str
    scale: Scale = POSITIVE
    best: bool = False  # marks the highest point


VALIDATION = Curve("val", "top1", 1, "Validation top-1", "%, best circled", PERCENT, best=True)
CURVES = (
    VALIDATION,
    Curve("train", "loss", 1, "Training loss", "nats, each method's own sum"),
    Curve("val", "nll", 1, "Validation loss", "negative log-likelihood in nats"),
    Curve("train", "kept", 100, "Attacked images kept by the filter", "%", PERCENT),
    Curve("train", "codes_changed", 100, "Codes changed by the attack", "%", PERCENT),
    Curve("val", "ece", 1, "Validation calibration error", "%", PERCENT),
)
COST_CURVES = (
    Curve("train", "img_per_s", 1, "Throughput", "clean images a second"),
    Curve("train", "data_wait", 100, "Waiting for data", "% of the time", PERCENT),
    Curve("train", "gpu.power_w", 1, "Power of the GPU", "W"),
    Curve("train", "gpu_memory", 1, "GPU memory, highest so far", "GiB"),
)


def curves(groups: Sequence[Group], looks: Mapping[str, Look], shown: Sequence[Curve]) -> str:
    """Draw a chart per curve with one line per seed; a curve without points is left out."""
    figures = []
    for curve in shown:
        series = [
            _series(group.label, run, curve, looks[group.label])
            for group in groups
            for run in group.runs
        ]
        if any(line.points for line in series):
            chart = line_chart(curve.heading, curve.unit, "step", series, curve.scale)
            figures.append(chart)
    return grid(figures)


def _series(label: str, run: Run, curve: Curve, look: Look) -> Series:
    color, dashes = look
    points = _points(run, curve)
    marks = []
    if curve.best and len(points) > 1:
        step, value = best(points)
        marks = [((step, value), f"{label}: best, {value:.1f} at step {step:,.0f}")]
    return Series(label, color, points, dashes, marks)


def _points(run: Run, curve: Curve) -> Points:
    points = []
    for row in run.kind(curve.kind):
        step, value = number(row, "step"), number(row, curve.value)
        if step is not None and value is not None:
            points.append((step, curve.factor * value))
    return points


def best(points: Points) -> tuple[float, float]:
    """Return the first of the highest points."""
    return max(points, key=lambda point: point[1])


def best_table(groups: Sequence[Group]) -> str:
    """Return the best and the last validation of each group, means over seeds, and the steps."""
    body = []
    for group in groups:
        logged = [_points(run, VALIDATION) for run in group.runs]
        found = [points for points in logged if points]
        if not found:
            continue
        tops = [best(points) for points in found]
        steps = ", ".join(f"{step:,.0f}" for step, _ in tops)
        cells = [
            numbers([value for _, value in tops], "{:.1f}".format),
            steps,
            numbers([points[-1][1] for points in found], "{:.1f}".format),
            f"{statistics.fmean(map(len, found)):.3g}",
        ]
        body.append([group.label, *cells])
    header = ["", "best, %", "at step", "last, %", "validations"]
    return table(header, body, caption="Validation top-1, mean over seeds") if body else ""
