"""The tables of a sweep: the cells of each axis as differences from the base, paired by seed.

The record is that of a comparison (dad_fast.evaluation.tables) with one more part:

    "ablation": {"base": cell, "axes": {axis: [cell, ...]}, "stores": [kind, ...],
                 "failed": {cell: reason},
                 "cells": {cell: {suite: {metric: {"mean", "sd", "seeds", "difference",
                                                   "interval": [low, high] or None}}}}}

Differences are taken per seed: runs of one seed share their initial weights, image order and
augmentation, so their difference has a smaller spread than either. The interval is Student's t at
95 % over these differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dad_fast.evaluation import tables as table
from dad_fast.evaluation.tables import Grid, cell, markdown, spread, suites, variants
from dad_fast.report.intervals import Difference, difference


def summary(record: dict[str, Any], base: str) -> dict[str, Any]:
    """Return `record["ablation"]["cells"]`: every cell on every suite, by every metric."""
    grouped = variants(record)
    found: dict[str, Any] = {}
    for name, runs in grouped.items():
        found[name] = {}
        for suite in suites(record):
            found[name][suite] = {}
            for metric in table.METRICS:
                values = cell(runs, suite, metric)
                if values is None:
                    continue
                mean, deviation = values
                entry: dict[str, Any] = {"mean": mean, "sd": deviation, "seeds": len(runs)}
                change = difference(grouped.get(base, []), runs, suite, metric)
                if change is not None and name != base:
                    entry |= {"difference": change.mean, "interval": change.interval}
                found[name][suite][metric] = entry
    return found


def axis_rows(record: dict[str, Any], axis: str) -> Grid:
    """Return header, rows of text, and the (row, column) of differences whose interval excludes 0.

    The base is the first row, with its accuracy instead of a difference.
    """
    names, grouped, ablation = suites(record), variants(record), record["ablation"]
    base = grouped.get(ablation["base"], [])
    seconds = _seconds(base)
    rows, clear = [], set()
    for name in ablation["axes"][axis]:
        runs = grouped.get(name)
        if runs is None:
            rows.append([name, "0", "", "", *("–" for _ in names)])
            continue
        is_base = name == ablation["base"]
        label = f"{name} (base)" if is_base else name
        ratio = f"{_seconds(runs) / seconds:.2f}" if seconds else "–"
        row = [label, str(len(runs)), f"{_seconds(runs):.0f}", ratio]
        for suite in names:
            if is_base:
                row.append(_absolute(cell(runs, suite, "top1")))
                continue
            found = difference(base, runs, suite)
            if found is not None and _excludes_zero(found.interval):
                clear.add((len(rows), len(row)))
            row.append(_relative(found))
        rows.append(row)
    return ["", "seeds", "train s", "× base", *names], rows, clear


def _excludes_zero(interval: tuple[float, float] | None) -> bool:
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def _seconds(runs: Sequence[dict[str, Any]]) -> float:
    return spread([float(run["seconds"]) for run in runs])[0] if runs else 0.0


def _absolute(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return "–"
    mean, deviation = found
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _relative(found: Difference | None) -> str:
    if found is None:
        return "–"
    words = f"{found.mean:+.1f}"
    if found.interval is not None:
        low, high = found.interval
        words += f" [{low:+.1f}, {high:+.1f}]"
    return words.replace("-", "−")


def notes(record: dict[str, Any]) -> list[str]:
    """Return the lines below the tables: how to read the numbers."""
    ablation, base = record["ablation"], record["ablation"]["base"]
    tables = [axis_rows(record, axis) for axis in ablation["axes"]]
    clear = sum(len(found) for *_, found in tables)
    compared = sum("[" in text for _, rows, _ in tables for row in rows for text in row)
    lines = [
        f"The row of {base} is top-1 accuracy in %, mean ± standard deviation over seeds; "
        "the others: difference from it in points."
    ]
    if compared:
        lines.append(
            "[low, high]: 95 % interval of the difference over seeds, paired (Student's t). "
            "Bold: it leaves 0 out."
        )
        lines.append(
            f"Of {compared} intervals {clear} leave 0 out; "
            f"about {0.05 * compared:.0f} would by chance alone. "
            "The spread is that of student seeds only: teacher, discretizer and data are the same."
        )
    else:
        lines.append("One seed has no spread: do not read small differences.")
    if ablation["stores"]:
        kinds = {
            "adversarial": "adversarial images, un-augmented",
            "targets": "the teacher's outputs on augmented views",
        }
        what = " and ".join(kinds[kind] for kind in ablation["stores"])
        lines.append(
            f"Cells that can, the base too, learn from stores ({what}), drawn once for all seeds; "
            "online runs may differ."
        )
    shared = max(int(run.get("shared_by") or 1) for run in record["runs"])
    if shared > 1:
        lines.append(
            f"Up to {shared} cells learned from the same batches; each counts an equal part of the "
            "seconds, less than a run of its own takes (--no-share-batches)."
        )
    lines += [f"{name} failed: {why}" for name, why in ablation["failed"].items()]
    return lines


def axes_markdown(record: dict[str, Any]) -> str:
    """Return a table for each axis, and their notes."""
    lines: list[str] = []
    for axis in record["ablation"]["axes"]:
        lines += [f"## {axis}", "", *table.grid_markdown(axis_rows(record, axis)), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(record)), ""])


def ablation_markdown(record: dict[str, Any]) -> str:
    """Return the axes' tables, then top-1 and ECE of every cell."""
    parts = [axes_markdown(record), "## every cell", ""]
    parts += [markdown(record), "", markdown(record, "ece"), ""]
    return "\n".join(parts)


def print_ablation(record: dict[str, Any]) -> None:
    """Print the axes' tables and notes."""
    grids = {axis: axis_rows(record, axis) for axis in record["ablation"]["axes"]}
    table.print_grids(grids, notes(record), ablation_markdown(record))
