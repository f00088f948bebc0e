"""Results of the report: tables of metrics, bars per shift, reliability diagrams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dad_fast.evaluation.tables import METRICS, rows, suites, teachers
from dad_fast.report.chart import MIN_COUNT, Bar, Reliability, bar_chart, reliability_chart
from dad_fast.report.intervals import MIN_SEEDS, interval
from dad_fast.report.looks import TEACHER, Look
from dad_fast.report.markup import details, grid, notes, table
from dad_fast.report.run_files import number
from dad_fast.report.runs import Group


def result_tables(record: dict[str, Any]) -> str:
    """Return tables of top-1 and ECE, then the other metrics and the suites' protocols, folded."""
    tables = {}
    for metric, (words, *_) in METRICS.items():
        header, body, best = rows(record, metric)
        # Older records lack some metrics, and so do some suites.
        if any(cell != "–" for row in body for cell in row[4:]):
            cells = [["–" if cell == "nan" else cell for cell in row] for row in body]
            tables[metric] = table(header, cells, best, words)
    further = [content for metric, content in tables.items() if metric not in ("top1", "ece")]

    protocols = []
    for suite in suites(record):
        results = [result for _, found in of_suite(record, suite) for result in found]
        texts = dict.fromkeys(str(one["protocol"]) for one in results if one.get("protocol"))
        if texts:
            protocols.append(f"{suite}: {' | '.join(texts)}")
    return (
        tables.get("top1", "")
        + tables.get("ece", "")
        + details("Further metrics", "".join([*further, _detection(record)]))
        + details("How the suites were evaluated", notes(protocols))
    )


def _detection(record: dict[str, Any]) -> str:
    """Return AUROC, AUPR and FPR95 on images of unknown classes, of the runs that have them."""
    header = ["", "unknown images", "score", "AUROC, %", "AUPR, %", "FPR95, %"]
    body = []
    for run in record["runs"]:
        unknown = run["ood"] if isinstance(run.get("ood"), dict) else {}
        for suite, scores in unknown.items():
            for score, found in scores.items() if isinstance(scores, dict) else ():
                metrics = found if isinstance(found, dict) else {}
                values = [number(metrics, key) for key in ("auroc", "aupr", "fpr95")]
                cells = ["–" if value is None else f"{value:.1f}" for value in values]
                body.append([run["variant"], suite, score, *cells])
    if not body:
        return ""
    caption = "Detection of images of unknown classes, by the model's confidence"
    return table(header, body, caption=caption)


def of_suite(record: dict[str, Any], suite: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (name, results of its seeds) of every teacher and group evaluated on `suite`."""
    all_teachers = teachers(record)
    of_teachers = [
        ("teacher" if len(all_teachers) == 1 else teacher["name"], [teacher["suites"][suite]])
        for teacher in all_teachers
        if suite in teacher["suites"]
    ]
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        if suite in run["suites"]:
            grouped.setdefault(run["variant"], []).append(run["suites"][suite])
    return of_teachers + list(grouped.items())


def bars(record: dict[str, Any], looks: dict[str, Look]) -> str:
    figures = []
    for suite in suites(record):
        drawn = []
        for name, results in of_suite(record, suite):
            values = [float(result["top1"]) for result in results]
            color = looks.get(name, TEACHER)[0]
            mean = math.fsum(values) / len(values)
            seeds = values if len(values) > 1 else ()
            drawn.append(Bar(name, mean, interval(results), color, seeds))
        if drawn:
            figures.append(bar_chart(suite, "top-1, %", drawn))
    return grid(figures)


def bar_notes(groups: Sequence[Group]) -> list[str]:
    lines = ["Whiskers and brackets: 95 % intervals. Circles: single seeds."]
    if any(len(group.finished) >= MIN_SEEDS for group in groups):
        lines.append(
            f"With {MIN_SEEDS} seeds or more: of the mean over seeds of the student (Student's t), "
            "for these test images."
        )
    few_seeds = any(len(group.finished) < MIN_SEEDS for group in groups)
    if few_seeds or any(record["teacher"] for group in groups for record in group.finished):
        lines.append(
            f"With fewer than {MIN_SEEDS} seeds, and for a teacher: over the test images, "
            "for this very model (bootstrap if the run recorded it, Wilson's interval otherwise); "
            "it does not cover other seeds."
        )
    return lines


def reliability(record: dict[str, Any], looks: dict[str, Look]) -> str:
    figures = []
    for suite in suites(record):
        series = []
        for name, results in of_suite(record, suite):
            found = _pooled([result.get("reliability") for result in results])
            if found:
                color, dashes = looks.get(name, TEACHER)
                series.append(Reliability(name, color, *found, dashes))
        if series:
            figures.append(reliability_chart(suite, f"{len(series[0].count)} bins", series))
    return grid(figures)


def _pooled(recorded: Sequence[Any]) -> tuple[list[float], list[float], list[float]] | None:
    """Return count, confidence and accuracy per bin over all seeds; None if one is unusable."""
    columns = []
    for one in recorded:
        try:
            found = [
                [float(value) for value in one[key]] for key in ("count", "confidence", "accuracy")
            ]
        except (KeyError, TypeError, ValueError):
            return None
        if len({len(values) for values in found}) != 1 or not found[0] or min(found[0]) < 0:
            return None
        bins = []
        for n, c, a in zip(*found, strict=True):
            bins.append((n, c, a) if n and math.isfinite(c + a) else (0.0, 0.0, 0.0))
        columns.append(bins)
    if not columns or len({len(bins) for bins in columns}) != 1:
        return None
    counts, confidence, accuracy = [], [], []
    for same in zip(*columns, strict=True):
        count = sum(n for n, _, _ in same)
        counts.append(count)
        confidence.append(sum(n * c for n, c, _ in same) / count if count else 0.0)
        accuracy.append(sum(n * a for n, _, a in same) / count if count else 0.0)
    return counts, confidence, accuracy


def reliability_notes() -> list[str]:
    return [
        "Images are binned by the largest softmax output. "
        "Above the diagonal a model is underconfident, below it overconfident.",
        "A dot's area and the columns below: share of the images. "
        f"Bins of fewer than {MIN_COUNT} images have no dot; seeds are pooled.",
    ]
