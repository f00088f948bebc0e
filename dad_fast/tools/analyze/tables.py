"""Markdown tables of `dad-fast analyze`, made from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dad_fast.tools.analyze.measure import FILTERED

SPACES = {
    "teacher": "features of the teacher {teacher[name]}, of length 1",
    "student": "features of the student {student[name]} ({student[file]}), of length 1",
    "pixels": "images of at most 32 px a side, as the root mean square over pixels",
}


def markdown(record: Mapping[str, Any]) -> str:
    """Return the text of analysis.md."""
    distances, sets = record["distances"], record["sets"]
    lines = ["# Generated images and test sets", "", *_notes(record), ""]
    titles = [one["title"] for one in sets.values()]
    lines += _head("SW2 distance to", *titles, "floor")
    for test, found in distances["tests"].items():
        cells = [_pm(one["sw2"]) for one in found["sets"].values()]
        lines.append(_row(test, *cells, _pm(found["floor"]["sw2"])))
    lines += ["", *_head("squared SW2, corrected, x 1000", *titles)]
    for test, found in distances["tests"].items():
        cells = []
        for one in found["sets"].values():
            text = _pm(one["sw2_squared_corrected"], 1000)
            cells.append(f"**{text}**" if one["minus_clean"]["interval"][1] < 0 else text)
        lines.append(_row(test, *cells))
    lines += ["", *_head("MMD^2 x 1000", *titles, "floor")]
    for test, found in distances["tests"].items():
        lines.append(
            _row(
                test,
                *(_pm(one["mmd2"], 1000) for one in found["sets"].values()),
                _pm(found["floor"]["mmd2"], 1000),
            )
        )
    lines += [
        "",
        *_head(
            "set",
            "teacher top-1 %",
            "counted",
            "codes changed %",
            "class moves %",
            "mean distance",
            "Vendi score",
        ),
    ]
    for one in sets.values():
        changed = _pm(one["codes_changed"], 100, 1) if one["codes_changed"] else ""
        moved = _pm(one["moved"], 100, 1) if "moved" in one else ""
        counted = f"{one['num_counted']:,} of {one['num_images']:,}"
        numbers = f"{one['mean_distance']:.3f}", f"{one['vendi_score']:.2f}"
        lines.append(
            _row(one["title"], f"{one['teacher_top1']:.1f}", counted, changed, moved, *numbers)
        )
    for name, one in record["tests"].items():
        lines.append(
            _row(
                name,
                "",
                f"{one['num_images']:,}",
                "",
                "",
                f"{one['mean_distance']:.3f}",
                f"{one['vendi_score']:.2f}",
            )
        )
    for one in sets.values():
        if one.get("moved", {}).get("top"):
            top = ", ".join(
                f"{move['from']} → {move['to']} {move['images']}"
                for move in one["moved"]["top"][:5]
            )
            lines += [
                "",
                f"{one['title']} moves the teacher's class of clean images most often: {top}.",
            ]
    return "\n".join(lines) + "\n"


def _notes(record: Mapping[str, Any]) -> list[str]:
    found = record["distances"]
    filtered = ", ".join(one["title"] for name, one in record["sets"].items() if name in FILTERED)
    notes = [
        f"Space: {SPACES[record['features']].format(**record)}. Every distance is between {found['half']:,} images of each side: "
        f"random halves of {found['size']:,}, {found['resamples']} times; ± is half of the 95 % interval over them.",
        f"SW2: over {found['projections']} directions. Its floor is the distance of the two halves of the test set. Corrected: less "
        "half of both sides' own floors, so sets of one distribution give 0 on average. Bold: nearer than the clean images, by a "
        "difference whose 95 % interval excludes 0.",
        f"MMD: Gaussian kernel, bandwidth {found['bandwidth']:.3g}, the median distance within the clean images; unbiased.",
    ]
    if record["filter"]:
        notes.append(
            f"{filtered}: only images that the teacher classifies as their label are counted, as in "
            "the loss (--no-filter counts all)."
        )
    if record["student"] is None:
        notes.append("DAT is left out: no student was named.")
    return [f"- {note}" for note in notes]


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|---" + "|---:" * (len(cells) - 1) + "|"]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _pm(found: Mapping[str, Any], factor: float = 1, digits: int = 0) -> str:
    """Format a value ± half of its interval, with `digits` digits or as many as the half justifies."""
    half = factor * (found["interval"][1] - found["interval"][0]) / 2
    if half <= 0:
        digits = 1
    elif not digits:
        digits = min(4, max(1, 1 - int(np.floor(np.log10(half)))))
    return f"{factor * found['value']:.{digits}f} ± {half:.{digits}f}"
