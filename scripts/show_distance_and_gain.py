"""The plot and the tables in docs/analyze.md, from docs/records/analyze.json: python scripts/show_distance_and_gain.py"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dad_fast.files import atomic_write_text
from dad_fast.tools.analyze.measure import TITLES

SPACES = {
    "teacher": "teacher's features",
    "student": "features of a student trained without",
    "pixels": "pixels",
}
MEASURES = {"sw2_squared_corrected": "SW2²", "mmd2": "MMD²"}
MARKS = "<!-- results -->\n", "<!-- end of results -->\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Each point is a generator on a test set: how much nearer than clean images it lies, and how much more it helps than they do."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "distance and gain",
        "svg.fonttype": "none",
        "font.size": 9,
    }
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(SPACES), figsize=(11, 4), sharey=True, layout="constrained"
    )
    for axis, (space, label) in zip(axes, SPACES.items(), strict=True):
        for name, color in zip(
            list(TITLES)[1:], ("#4477aa", "#228833", "#ccbb44", "#ee6677"), strict=True
        ):
            points = []
            for suite in record["top1"]["none"]:
                sets = record["distances"][space][suite]
                nearer = (
                    sets[name]["sw2_squared_corrected"]["value"]
                    - sets["clean"]["sw2_squared_corrected"]["value"]
                )
                points.append(
                    (
                        1000 * nearer,
                        np.mean(record["top1"][name][suite])
                        - np.mean(record["top1"]["clean"][suite]),
                    )
                )
            axis.scatter(
                *zip(*points, strict=True),
                s=16,
                color=color,
                label=TITLES[name],
                alpha=0.8,
                linewidths=0,
            )
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set_title(label, fontsize=9)
    axes[1].set_xlabel(
        "squared SW2 to the test set, corrected, x 1000, less that of clean images (left is nearer)"
    )
    axes[0].set_ylabel("top-1 gained, in points, less what\nclean images as the second set gain")
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def tables(record: dict[str, Any]) -> str:
    """What docs/analyze.md shows: the relation, gains and distances."""
    lines = [
        "| space | distance | test sets | mean rank correlation | 95 % interval | p | pooled |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for space, title in SPACES.items():
        for measure, label in MEASURES.items():
            for which, one in record["relation"][space][measure].items():
                low, high = one["interval"]
                tests = f"{'all' if which == 'all' else 'shift seen:'} {one['num_tests']}"
                numbers = f"{one['rho']:+.2f} | {low:+.2f} to {high:+.2f} | {one['p']:.2f} | {one['pooled']:+.2f}"
                lines.append(f"| {title} | {label} | {tests} | {numbers} |")
    top1, sets, suites = record["top1"], list(TITLES), list(record["top1"]["none"])
    titles = [TITLES[name] for name in sets]
    lines += [
        "",
        "| top-1 gained | without | " + " | ".join(titles) + " |",
        "|---|" + "---:|" * (len(sets) + 1),
    ]
    for suite in suites:
        gains = [np.subtract(top1[name][suite], top1["none"][suite]) for name in sets]
        most = max(gain.mean() for gain in gains)
        cells = [f"{gain.mean():+.1f} ± {gain.std(ddof=1):.1f}" for gain in gains]
        cells = [
            f"**{cell}**" if gain.mean() == most else cell
            for cell, gain in zip(cells, gains, strict=True)
        ]
        lines.append(
            f"| {suite} | {np.mean(top1['none'][suite]):.1f} | " + " | ".join(cells) + " |"
        )
    lines += ["", "<details><summary>Distances</summary>"]
    for space, title in SPACES.items():
        of_suites = {
            suite: [
                record["distances"][space][suite][name]["sw2_squared_corrected"] for name in sets
            ]
            for suite in suites
        }
        halves = {
            suite: [(one["interval"][1] - one["interval"][0]) / 2 for one in found]
            for suite, found in of_suites.items()
        }
        power = 1 - math.floor(
            math.log10(max(one["value"] for found in of_suites.values() for one in found))
        )
        digits = max(
            1, 1 - power - math.floor(math.log10(np.median(list(halves.values()))))
        )  # two of the usual interval
        lines += [
            "",
            f"| SW2² x 1e{power}: {title} | " + " | ".join(titles) + " |",
            "|---|" + "---:|" * len(sets),
        ]
        for suite, found in of_suites.items():
            least = min(one["value"] for one in found)
            cells = []
            for one, half in zip(found, halves[suite], strict=True):
                cell = f"{10**power * one['value']:.{digits}f} ± {10**power * half:.{digits}f}"
                cells.append(f"**{cell}**" if one["value"] == least else cell)
            lines.append(f"| {suite} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "</details>"]) + "\n"


def renew(document: Path, text: str) -> None:
    """Put `text` between the marks of `document`."""
    before, found, rest = document.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (found and end):
        sys.exit(f"{document}: the lines {MARKS[0].strip()} and {MARKS[1].strip()} are missing")
    atomic_write_text(document, before + MARKS[0] + text + MARKS[1] + after)


def show(docs: Path) -> None:
    """The plot and the tables of the record in `docs`."""
    record = json.loads((docs / "records" / "analyze.json").read_text())
    plot(record, docs / "analyze.svg")
    renew(docs / "analyze.md", tables(record))


if __name__ == "__main__":
    show(Path(__file__).resolve().parents[1] / "docs")
