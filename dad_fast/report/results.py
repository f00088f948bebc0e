"""Results of the report: tables of metrics, what may be compared with what, bars per shift, reliability diagrams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dad_fast.evaluate.tables import METRICS, rows, suites, teachers
from dad_fast.methods.registry import BASELINE
from dad_fast.report.chart import MIN_COUNT, Bar, Reliability, bar_chart, reliability_chart
from dad_fast.report.intervals import MIN_SEEDS, interval
from dad_fast.report.markup import details, grid, notes, table
from dad_fast.report.run_files import machine, number
from dad_fast.report.runs import Group

TEACHER = ("var(--soft)", "")  # colour and dashes
EQUAL_EPOCHS, EQUAL_TIME = 0.02, 0.15  # relative differences that still count as equal


def result_tables(record: dict[str, Any]) -> str:
    """Top-1 and ECE in the open, the other metrics that were measured folded away, and how each suite was judged."""
    tables = {}
    for metric, (words, *_) in METRICS.items():
        header, body, best = rows(record, metric)
        if any(
            cell != "–" for row in body for cell in row[4:]
        ):  # older records lack some metrics, and some suites do
            tables[metric] = table(
                header,
                [["–" if cell == "nan" else cell for cell in row] for row in body],
                best,
                words,
            )
    folded = "".join(content for metric, content in tables.items() if metric not in ("top1", "ece"))
    protocols = {}
    for suite in suites(record):
        judged = [result for _, results in of_suite(record, suite) for result in results]
        protocols[suite] = " | ".join(
            dict.fromkeys(str(result["protocol"]) for result in judged if result.get("protocol"))
        )
    folded += _detection(record)
    said = notes([f"{suite}: {words}" for suite, words in protocols.items() if words])
    return (
        tables.get("top1", "")
        + tables.get("ece", "")
        + details("Further metrics", folded)
        + details("How the suites were judged", said)
    )


def _detection(record: dict[str, Any]) -> str:
    """AUROC and FPR95 of images of unknown classes, where a run or an evaluation has judged them; "" elsewhere."""
    header, body = ["", "unknown images", "score", "AUROC, %", "AUPR, %", "FPR95, %"], []
    for run in record["runs"]:
        unknown = run["ood"] if isinstance(run.get("ood"), dict) else {}
        for suite, scores in unknown.items():
            for score, found in scores.items() if isinstance(scores, dict) else ():
                values = [
                    number(found, key) if isinstance(found, dict) else None
                    for key in ("auroc", "aupr", "fpr95")
                ]
                body.append(
                    [
                        run["variant"],
                        suite,
                        score,
                        *("–" if value is None else f"{value:.1f}" for value in values),
                    ]
                )
    return (
        table(
            header, body, caption="Detection of images of unknown classes, by how sure the model is"
        )
        if body
        else ""
    )


def fairness(groups: Sequence[Group]) -> list[str]:
    """What each method that costs more than distillation may be compared with: KD at equal epochs, KD at equal time.

    Time is training and filling the stores that the run learns from.
    """
    equal_epochs: dict[str, list[str]] = {}
    equal_time: dict[str, list[str]] = {}
    alone = []
    for group in groups:
        baselines = [
            other
            for other in groups
            if other.method == BASELINE and other.finished and _machines(other) == _machines(group)
        ]
        if group.is_plain or not group.finished or not baselines:
            continue
        timed = False
        for other in baselines:
            epochs, seconds = (
                _ratio(group, other, "epochs"),
                _ratio(group, other, "seconds", "store_seconds"),
            )
            times = (
                f"{group.label} ({seconds:.2g} times its time)"
                if seconds is not None
                else group.label
            )
            if epochs is not None and abs(epochs - 1) <= EQUAL_EPOCHS:
                equal_epochs.setdefault(other.label, []).append(times)
            if seconds is not None and abs(seconds - 1) <= EQUAL_TIME:
                equal_time.setdefault(other.label, []).append(times)
                timed = True
        alone += [] if timed else [group.label]
    lines = [
        f"At equal epochs, compare with {name}: {', '.join(found)}."
        for name, found in equal_epochs.items()
    ]
    lines += [
        f"At equal time, compare with {name}: {', '.join(found)}."
        for name, found in equal_time.items()
    ]
    if alone:
        lines.append(
            f"No KD run here took as long as {' or '.join(alone)}: part of a gain over KD may be longer training."
        )
    return lines


def _machines(group: Group) -> set[str]:
    return {machine(run.facts) for run in group.runs}


def _ratio(group: Group, other: Group, key: str, *more: str) -> float | None:
    """The group's mean of a record's number, and of what `more` adds to it, over the other's."""
    means = []
    for one in (group, other):
        values = [number(record, key) for record in one.finished]
        if None in values or not sum(filter(None, values)):
            return None
        added = [number(record, name) or 0.0 for record in one.finished for name in more]
        means.append((sum(filter(None, values)) + sum(added)) / len(values))
    return means[0] / means[1]


def of_suite(record: dict[str, Any], suite: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, results of its seeds) of every teacher and group that was judged by `suite`."""
    taught_by = teachers(record)
    judged = [
        ("teacher" if len(taught_by) == 1 else one["name"], [one["suites"][suite]])
        for one in taught_by
        if suite in one["suites"]
    ]
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        if suite in run["suites"]:
            grouped.setdefault(run["variant"], []).append(run["suites"][suite])
    return judged + list(grouped.items())


def bars(record: dict[str, Any], looks: dict[str, tuple[str, str]]) -> str:
    figures = []
    for suite in suites(record):
        drawn = []
        for name, results in of_suite(record, suite):
            values = [float(result["top1"]) for result in results]
            color = looks.get(name, TEACHER)[0]
            drawn.append(
                Bar(
                    name,
                    math.fsum(values) / len(values),
                    interval(results),
                    color,
                    values if len(values) > 1 else (),
                )
            )
        if drawn:
            figures.append(bar_chart(suite, "top-1, %", drawn))
    return grid(figures)


def bar_notes(groups: Sequence[Group]) -> list[str]:
    lines = ["Whiskers and brackets: 95 % intervals. Circles: single seeds."]
    if any(len(group.finished) >= MIN_SEEDS for group in groups):
        lines.append(
            f"With {MIN_SEEDS} seeds or more: of the mean over seeds of the student (Student's t), for these test images."
        )
    if any(len(group.finished) < MIN_SEEDS for group in groups) or any(
        record["teacher"] for group in groups for record in group.finished
    ):
        few = f"With fewer than {MIN_SEEDS} seeds, and for a teacher: over the test images, for this very model"
        lines.append(
            few
            + " (bootstrap where the run recorded it, Wilson's interval otherwise); it says nothing of other seeds."
        )
    return lines


def reliability(record: dict[str, Any], looks: dict[str, tuple[str, str]]) -> str:
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
    """Number of images, confidence and accuracy of each bin over all seeds; None where none is recorded or one is not sound."""
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
        columns.append(
            [
                (n, c, a) if n and math.isfinite(c + a) else (0.0, 0.0, 0.0)
                for n, c, a in zip(*found, strict=True)
            ]
        )
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
        "Images by the largest softmax output; above the diagonal a model is right more often than it says, below it less often.",
        f"A dot's area and the columns below: share of the images. Bins of fewer than {MIN_COUNT} images have no dot; seeds are pooled.",
    ]
