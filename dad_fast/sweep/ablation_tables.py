"""The tables of a sweep: for each axis its cells, as differences from the base, paired by seed.

The record is that of a comparison (table.py) with one part more:

    "ablation": {"base": cell, "axes": {axis: [cell, ...]}, "stores": [kind, ...], "failed": {cell: why},
                 "cells": {cell: {suite: {metric: {"mean", "sd", "difference", "interval": [low, high] or None, "seeds"}}}}}

A difference is taken seed by seed: runs of one seed share their initial weights, their order of images and their augmentation, so that
their difference spreads less than either. Its interval is Student's t at 95 % over these differences.

`python -m dad_fast.sweep.ablation_tables OUT/results.json` prints the tables as markdown.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from dad_fast.errors import DataError, UsageError, program
from dad_fast.evaluate import tables as table
from dad_fast.evaluate.tables import (
    Grid,
    cell,
    markdown,
    read_record,
    spread,
    suites,
    value_of,
    variants,
)

# Student's t at 97.5 %, for 1 to 9 degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


class Difference(NamedTuple):
    mean: float
    interval: tuple[float, float] | None  # 95 %; None for a single pair
    pairs: list[float]  # one per seed that both have


def difference(
    base: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], suite: str, metric: str = "top1"
) -> Difference | None:
    """`runs` minus `base` in `metric` on `suite`, over the seeds that both have; None where there is none."""
    by_seed = {run["seed"]: value_of(run, suite, metric) for run in base}
    both = ((value_of(run, suite, metric), by_seed.get(run["seed"])) for run in runs)
    pairs = [here - there for here, there in both if here is not None and there is not None]
    if not pairs:
        return None
    mean, deviation = spread(pairs)
    if deviation is None:
        return Difference(mean, None, pairs)
    half = t_quantile(len(pairs) - 1) * deviation / math.sqrt(len(pairs))
    return Difference(mean, (mean - half, mean + half), pairs)


def t_quantile(degrees: int) -> float:
    """Student's t at 97.5 %, to 0.004: a table, then its expansion around the normal distribution."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def summary(record: dict[str, Any], base: str) -> dict[str, Any]:
    """What `record["ablation"]["cells"]` holds."""
    grouped = variants(record)
    found: dict[str, Any] = {}
    for name, runs in grouped.items():
        found[name] = {}
        for suite in suites(record):
            found[name][suite] = {}
            for metric in table.METRICS:
                here = cell(runs, suite, metric)
                against = difference(grouped.get(base, []), runs, suite, metric)
                if here is not None:
                    entry: dict[str, Any] = {"mean": here[0], "sd": here[1], "seeds": len(runs)}
                    if against is not None and name != base:
                        entry |= {"difference": against.mean, "interval": against.interval}
                    found[name][suite][metric] = entry
    return found


def axis_rows(record: dict[str, Any], axis: str) -> Grid:
    """Header, rows of text (the base first, as it is), and the (row, column) of differences whose interval leaves 0 out."""
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
        ratio = f"{_seconds(runs) / seconds:.2f}" if seconds else "–"
        row = [
            f"{name} (base)" if is_base else name,
            str(len(runs)),
            f"{_seconds(runs):.0f}",
            ratio,
        ]
        for suite in names:
            if is_base:
                row.append(_absolute(cell(runs, suite, "top1")))
                continue
            found = difference(base, runs, suite)
            if (
                found is not None
                and found.interval is not None
                and (found.interval[0] > 0 or found.interval[1] < 0)
            ):
                clear.add((len(rows), len(row)))
            row.append(_relative(found))
        rows.append(row)
    return ["", "seeds", "train s", "× base", *names], rows, clear


def _seconds(runs: Sequence[dict[str, Any]]) -> float:
    return spread([float(run["seconds"]) for run in runs])[0] if runs else 0.0


def _absolute(found: tuple[float, float | None] | None) -> str:
    return (
        "–"
        if found is None
        else f"{found[0]:.1f}" + ("" if found[1] is None else f" ± {found[1]:.1f}")
    )


def _relative(found: Difference | None) -> str:
    if found is None:
        return "–"
    interval = (
        "" if found.interval is None else f" [{found.interval[0]:+.1f}, {found.interval[1]:+.1f}]"
    )
    return f"{found.mean:+.1f}{interval}".replace("-", "−")


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader must know beside the numbers."""
    ablation, base = record["ablation"], record["ablation"]["base"]
    tables = [axis_rows(record, axis) for axis in ablation["axes"]]
    clear = sum(len(found) for *_, found in tables)
    compared = sum("[" in text for _, rows, _ in tables for row in rows for text in row)
    lines = [
        f"The row of {base} is top-1 accuracy in %, mean ± standard deviation over seeds; the others: difference from it in points."
    ]
    if compared:
        lines.append(
            "[low, high]: 95 % interval of the difference over seeds, paired (Student's t). Bold: it leaves 0 out."
        )
        lines.append(
            f"Of {compared} intervals {clear} leave 0 out; about {0.05 * compared:.0f} would by chance alone. "
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
            f"Cells that can, the base too, learn from stores ({what}), drawn once for all seeds; online runs may differ."
        )
    lines += [f"{name} failed: {why}" for name, why in ablation["failed"].items()]
    return lines


def axes_markdown(record: dict[str, Any]) -> str:
    """A table for each axis, and their notes."""
    lines: list[str] = []
    for axis in record["ablation"]["axes"]:
        lines += [f"## {axis}", "", *table.grid_markdown(axis_rows(record, axis)), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(record)), ""])


def ablation_markdown(record: dict[str, Any]) -> str:
    """The axes' tables, and those of every cell as it is."""
    return "\n".join(
        [
            axes_markdown(record),
            "## every cell",
            "",
            markdown(record),
            "",
            markdown(record, "ece"),
            "",
        ]
    )


def read_ablation(arguments: Sequence[str], module: str) -> dict[str, Any]:
    """The sweep's record that a command line of this module names. Raises DataError for another record."""
    if len(arguments) != 1:
        raise UsageError(f"usage: python -m dad_fast.{module} RESULTS.json")
    record = read_record(arguments[0])
    if "ablation" not in record:
        raise DataError(f"{arguments[0]}: not the record of a sweep (dad-fast ablate)")
    return record


def print_ablation(record: dict[str, Any]) -> None:
    """The axes' tables and notes on the terminal."""
    table.print_grids(
        {axis: axis_rows(record, axis) for axis in record["ablation"]["axes"]},
        notes(record),
        ablation_markdown(record),
    )


@program
def main(arguments: Sequence[str]) -> None:
    print(ablation_markdown(read_ablation(arguments, "evaluate.ablation")), end="")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
