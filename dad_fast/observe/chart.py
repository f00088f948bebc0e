"""Line and bar charts as inline SVG, with axes, ticks and labels; colours are CSS values, so that they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 40
MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    name: str
    color: str
    points: Sequence[tuple[float, float]]  # finite, in the order in which they are joined


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that span [low, high]: multiples of 1, 2 or 5 times a power of ten, at most `most` + 1 of them."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(heading: str, x_label: str, series: Sequence[Series]) -> str:
    """A figure with one line per series over an axis that holds 0; a series of one point is a dot. At least one series has a point."""
    xs, ys = zip(*(point for line in series for point in line.points), strict=True)
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        _, at = place(x_ticks[0], y)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        at, _ = place(x, y_ticks[0])
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for line in series:
        every = max(1, len(line.points) // MAX_POINTS)
        placed = [place(*point) for point in line.points[::every]]
        title = f"<title>{escape(line.name)}</title>"
        if len(placed) == 1:
            parts.append(f'<circle cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="3" style="fill:{line.color}">{title}</circle>')
        elif placed:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline points="{text}" style="fill:none;stroke:{line.color};stroke-width:2;opacity:0.85">{title}</polyline>')
    return _figure(heading, HEIGHT, parts)


def bar_chart(heading: str, bars: Sequence[tuple[str, float, float | None, str]]) -> str:
    """A figure of horizontal bars on an axis from 0 to 100: (label, mean, standard deviation or None, color)."""
    label_width, line, top, right = 130, 24, 4, 82
    scale = (WIDTH - label_width - right) / 100
    height = top + line * len(bars) + 24
    parts = []
    for value in (0, 25, 50, 75, 100):
        x = label_width + value * scale
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 20}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 5}" text-anchor="middle">{value}</text>')
    for i, (label, mean, deviation, color) in enumerate(bars):
        y = top + i * line
        end = label_width + min(max(mean, 0.0), 100.0) * scale if math.isfinite(mean) else label_width
        shown = f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
        cut = label if len(label) <= 17 else label[:16] + "…"
        parts.append(f'<text x="{label_width - 6}" y="{y + 16}" text-anchor="end">{escape(cut)}<title>{escape(label)}</title></text>')
        parts.append(f'<rect x="{label_width}" y="{y + 4}" width="{end - label_width:.1f}" height="{line - 8}" style="fill:{color}"/>')
        if deviation and math.isfinite(deviation):
            low, high = max(end - deviation * scale, label_width), min(end + deviation * scale, label_width + 100 * scale)
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 12}" y2="{y + 12}" stroke="currentColor" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - right + 8}" y="{y + 16}">{shown}</text>')
    return _figure(heading, height, parts)


def _figure(heading: str, height: int, parts: Sequence[str]) -> str:
    label = escape(heading)
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{label}</figcaption>{svg}</figure>"
