"""Confusion matrix as inline SVG: one path per shade, so that 200 classes stay small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dad_fast.report.chart import RIGHT, TOP, WIDTH, figure
from dad_fast.report.markup import text

MAX_CLASSES = 200
# Matrices of at most this many classes show numbers, and names of the rows.
MAX_NUMBERED, MAX_NAMED = 12, 20
# Opacity of the shades. Text stays legible on the darkest.
SHADES = (0.12, 0.24, 0.36, 0.48, 0.6)
NAME_WIDTH = 84
# Least share that is printed, and characters of a name.
LEAST_SHARE, NAME_LENGTH = 0.005, 11


def matrix_chart(
    heading: str, names: Sequence[str], shares: Mapping[tuple[int, int], float], color: str
) -> str:
    """Draw a confusion matrix.

    names: of the classes, in the order of rows and columns. shares: (row, column) -> share of the
    row's images, from 0 to 1; the diagonal is drawn in grey. The square root of the share is the
    shade, so that rare confusions are visible.
    """
    count = len(names)
    left = NAME_WIDTH if count <= MAX_NAMED else 4
    cell = (WIDTH - left - RIGHT) / count
    height = TOP + cell * count + 22
    paths: dict[tuple[str, float], list[str]] = {}
    words = []
    for (row, column), share in sorted(shares.items()):
        if share <= 0:
            continue
        fill = "var(--soft)" if row == column else color
        shade = SHADES[min(int(len(SHADES) * math.sqrt(share)), len(SHADES) - 1)]
        x, y = left + column * cell, TOP + row * cell
        square = f"M{x:.1f} {y:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z"
        paths.setdefault((fill, shade), []).append(square)
        if count <= MAX_NUMBERED and share >= LEAST_SHARE:
            middle = f'x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}"'
            words.append(f"<text {middle}>{100 * share:.0f}</text>")

    parts = [
        f'<path d="{"".join(squares)}" style="fill:{fill};fill-opacity:{shade}"/>'
        for (fill, shade), squares in paths.items()
    ]
    side = cell * count
    frame = f'x="{left}" y="{TOP}" width="{side:.1f}" height="{side:.1f}"'
    parts.append(f'<rect class="axis" {frame} style="fill:none"/>')
    if count <= MAX_NAMED:
        for row, name in enumerate(names):
            cut = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
            place = f'x="{left - 6}" y="{TOP + (row + 0.5) * cell + 4:.1f}" text-anchor="end"'
            parts.append(f"<text {place}>{text(cut)}<title>{text(name)}</title></text>")
    label = f'x="{left + side / 2:.1f}" y="{height - 5:.1f}" text-anchor="middle"'
    parts.append(f"<text {label}>prediction, in the order of the rows</text>")
    numbers = f'<g class="numbers" text-anchor="middle">{"".join(words)}</g>'
    return figure(heading, "in % of the row", height, [*parts, numbers])
