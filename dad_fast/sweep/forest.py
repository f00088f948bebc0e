"""Forest plot of a sweep as one SVG file: differences from the base with intervals, per suite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from dad_fast.evaluation.tables import suites, variants
from dad_fast.report.chart import ticks
from dad_fast.report.intervals import Difference, difference

LABELS, PANEL, GAP, ROW, TOP, BOTTOM = 180, 150, 36, 20, 64, 30
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1c1e21; } .soft { fill: #5f6670; } \
.axis { stroke: #d4d8dd; } .zero { stroke: #5f6670; }
.dot { fill: #0b62a8; } .seed { fill: #0b62a8; opacity: 0.55; } \
.range { stroke: #0b62a8; stroke-width: 2; } .head { font-weight: 600; }
"""


def forest_plot(record: dict[str, Any]) -> str:
    """Draw the record of a sweep (ablation_tables.py): a panel per suite, each on its own scale.

    Rows are cells by axis. Small dots are single seeds.
    """
    grouped, ablation = variants(record), record["ablation"]
    base, names = ablation["base"], suites(record)
    # (axis, "") is a heading, (axis, cell) a row.
    lines: list[tuple[str, str]] = []
    for axis, cells in ablation["axes"].items():
        shown = [name for name in cells if name != base and name in grouped]
        if shown:
            lines += [(axis, ""), *((axis, name) for name in shown)]
    width = LABELS + len(names) * (PANEL + GAP)
    height = TOP + ROW * len(lines) + BOTTOM

    parts = [
        f'<text class="head" x="8" y="20">Top-1 accuracy against {escape(base)}, in points</text>'
    ]
    seeds = len(grouped.get(base, []))
    what = "one seed: no spread"
    if seeds > 1:
        what = (
            f"mean and 95 % interval over {seeds} seeds, paired, cut at the panel's edge; "
            "small dots below: single seeds"
        )
    parts.append(f'<text class="soft" x="8" y="38">{what}</text>')
    for row, (axis, name) in enumerate(lines):
        y = TOP + row * ROW + 13
        style, x = ("", 20) if name else ("head", 8)
        parts.append(f'<text class="{style}" x="{x}" y="{y}">{escape(name or axis)}</text>')
    for number, suite in enumerate(names):
        found = [
            difference(grouped.get(base, []), grouped[name], suite) if name else None
            for _, name in lines
        ]
        parts += _panel(LABELS + number * (PANEL + GAP), suite, found, height)

    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    label = f'role="img" aria-label="Differences of every cell from {escape(base)}"'
    background = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>'
        f"<style>{STYLE.strip()}</style>{background}{''.join(parts)}</svg>\n"
    )


def _panel(left: int, suite: str, found: Sequence[Difference | None], height: int) -> list[str]:
    found = [item if item is not None and math.isfinite(item.mean) else None for item in found]
    reach = [value for item in found if item for value in item.pairs] + [0.0]
    # An interval over few seeds can be many times as wide as the values.
    room = (max(reach) - min(reach)) / 2
    ends = [
        min(max(end, min(reach) - room), max(reach) + room)
        for item in found
        if item and item.interval
        for end in item.interval
    ]
    marks = ticks(min(reach + ends), max(reach + ends), 4)
    low, high = marks[0], marks[-1]

    def at(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * PANEL

    bottom = height - BOTTOM
    middle = f'x="{left + PANEL / 2}" y="{TOP - 8}" text-anchor="middle"'
    parts = [f'<text class="head" {middle}>{escape(suite)}</text>']
    for mark in marks:
        style = "zero" if mark == 0 else "axis"
        x = f"{at(mark):.1f}"
        parts.append(f'<line class="{style}" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
        label = f'x="{x}" y="{bottom + 16}" text-anchor="middle"'
        parts.append(f'<text class="soft" {label}>{mark:g}</text>')
    for row, item in enumerate(found):
        if item is None:
            continue
        y = TOP + row * ROW + 8
        if item.interval is not None:
            start, end = map(at, item.interval)
            parts.append(f'<line class="range" x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>')
        if len(item.pairs) > 1:
            for value in item.pairs:
                parts.append(f'<circle class="seed" cx="{at(value):.1f}" cy="{y + 6}" r="1.8"/>')
        parts.append(f'<circle class="dot" cx="{at(item.mean):.1f}" cy="{y}" r="3.5"/>')
    return parts
