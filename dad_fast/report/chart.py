"""Line, bar and reliability charts as inline SVG, with axes, ticks and labels.

Colours are CSS values, so that they follow light and dark mode. A chart is as wide as a phone (360
units), so that its text keeps its size there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dad_fast.report.markup import stroke, text

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 38
MAX_POINTS = 300
# Images in a bin; the accuracy of fewer images is too noisy to draw.
MIN_COUNT = 10
# Half the range below which values count as equal.
SMALLEST_RANGE = 1e-300
# Height of the strip below a reliability diagram, and of the columns in it.
BINS_HEIGHT, COLUMNS_HEIGHT = 50, 32


@dataclass(frozen=True)
class Series:
    """A line. points: finite, in the order in which they are joined. marks: (point, tooltip)."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    dashes: str = ""
    marks: Sequence[tuple[tuple[float, float], str]] = ()


class Scale(NamedTuple):
    """The least range of an axis, so that noise of a flat curve does not fill the chart.

    least: in the values' unit. share: of the largest value. low, high: limits of the range.
    """

    least: float = 0.0
    share: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def range(self, values: Sequence[float]) -> tuple[float, float]:
        """Return the range of `values`, widened around its middle."""
        low, high = min(values), max(values)
        lowest, highest = min(self.low, low), max(self.high, high)
        wanted = max(self.least, self.share * max(abs(low), abs(high)))
        missing = max(wanted - (high - low), 0.0)
        low, high = low - missing / 2, high + missing / 2
        # What a limit cuts off is added at the other end.
        over, under = max(high - highest, 0.0), max(lowest - low, 0.0)
        return max(low - over, lowest), min(high + under, highest)


AS_IT_IS = Scale()
PERCENT = Scale(least=10.0, low=0.0, high=100.0)


@dataclass(frozen=True)
class Bar:
    """A mean with its 95 % interval and the averaged values, all in percent."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    color: str
    values: Sequence[float] = ()


@dataclass(frozen=True)
class Reliability:
    """Per bin: number of images, mean confidence, accuracy."""

    name: str
    color: str
    count: Sequence[float]
    confidence: Sequence[float]
    accuracy: Sequence[float]
    dashes: str = ""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return about `most` round numbers that span [low, high], at least two different ones.

    They are multiples of 1, 2 or 5 times a power of ten.
    """
    largest = max(abs(low), abs(high))
    if high / 2 - low / 2 <= max(1e-9 * largest, SMALLEST_RANGE):
        half = max(0.5, 1e-6 * largest)
        low, high = low - half, high + half
    # Not of the difference, which may overflow.
    raw = high / most - low / most
    exponent = math.floor(math.log10(raw))
    power = 10.0**exponent
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 2 - exponent) for i in range(first, last + 1)]


def line_chart(
    heading: str,
    unit: str,
    x_label: str,
    series: Sequence[Series],
    scale: Scale = AS_IT_IS,
    x_start: float = 0.0,
) -> str:
    """Draw one line per series over an x axis that contains x_start; a single point is a dot.

    At least one series has a point. scale: of the y axis.
    """
    xs, ys = zip(*(point for line in series for point in line.points), strict=True)
    x_ticks, y_ticks = ticks(min(x_start, *xs), max(x_start, *xs)), ticks(*scale.range(ys))
    place = _placer(x_ticks, y_ticks, HEIGHT)
    parts = _axes(x_ticks, y_ticks, place, HEIGHT, x_label)
    for line in series:
        placed = [place(*point) for point in _thinned(line.points)]
        title = f"<title>{text(line.name)}</title>"
        if len(placed) == 1:
            x, y = placed[0]
            dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{line.color}">'
            parts.append(f"{dot}{title}</circle>")
        elif placed:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            style = f"fill:none;{stroke(line.color, line.dashes)};opacity:0.85"
            parts.append(f'<polyline points="{path}" style="{style}">{title}</polyline>')
        for point, words in line.marks:
            x, y = place(*point)
            ring = f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.5" '
            parts.append(f'{ring}style="stroke:{line.color}"><title>{text(words)}</title></circle>')
    return figure(heading, unit, HEIGHT, parts)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours if there are more points than a chart can show."""
    every = -(-len(points) // MAX_POINTS)
    if every <= 1:
        return list(points)
    parts = [points[i : i + every] for i in range(0, len(points), every)]
    return [
        (statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part))
        for part in parts
    ]


def bar_chart(heading: str, unit: str, bars: Sequence[Bar]) -> str:
    """Draw bars from 0 to 100, with intervals as whiskers and single values as circles."""
    line, top = 36, 4
    left, right = 4, 12
    scale = (WIDTH - left - right) / 100
    height = top + line * len(bars) + 24
    parts = []
    for value in (0, 25, 50, 75, 100):
        x = left + value * scale
        anchor = {0: "start", 100: "end"}.get(value, "middle")
        words = "100 %" if value == 100 else str(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top + 14}" y2="{height - 20}"/>'
        )
        parts.append(_label(f"{x:.1f}", height - 5, anchor, words))
    for i, bar in enumerate(bars):
        y = top + i * line
        end = left + _clip(bar.mean) * scale
        shown = f"{bar.mean:.1f}"
        if bar.interval:
            shown += f" [{bar.interval[0]:.1f}, {bar.interval[1]:.1f}]"
        # A name that is too long is cut; the tooltip shows all of it.
        room = int((WIDTH - left - right - 6.3 * len(shown) - 10) / 6.6)
        cut = bar.name if len(bar.name) <= room else bar.name[: room - 1] + "…"
        tooltip = f"<title>{text(bar.name)}</title>"
        parts.append(f'<text class="name" x="{left}" y="{y + 14}">{text(cut)}{tooltip}</text>')
        parts.append(_label(WIDTH - right, y + 14, "end", shown))
        box = f'x="{left}" y="{y + 19}" width="{end - left:.1f}" height="12"'
        parts.append(f'<rect {box} style="fill:{bar.color};opacity:0.75"/>')

        if bar.interval:
            low, high = (left + _clip(bound) * scale for bound in bar.interval)
            ends = "".join(f"M{x:.1f} {y + 20}v10" for x in (low, high))
            whisker = f"M{low:.1f} {y + 25}H{high:.1f}{ends}"
            style = "stroke:var(--text);stroke-width:1.5;fill:none"
            parts.append(f'<path d="{whisker}" style="{style}"/>')
        for single in bar.values:
            x = left + _clip(single) * scale
            style = "fill:var(--back);stroke:var(--text)"
            parts.append(f'<circle cx="{x:.1f}" cy="{y + 25}" r="2.5" style="{style}"/>')
    return figure(heading, unit, height, parts)


def reliability_chart(heading: str, unit: str, series: Sequence[Reliability]) -> str:
    """Draw accuracy over confidence with the diagonal, and the share of images per bin below it.

    A dot's area is the share of the images. Bins of fewer than MIN_COUNT images have no dot.
    """
    axis = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    bottom = HEIGHT - BOTTOM + 40
    height = bottom + BINS_HEIGHT + BOTTOM
    place = _placer(axis, axis, bottom + BOTTOM)
    parts = _axes(axis, axis, place, bottom + BOTTOM, "", with_x=False)
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    parts.append(f'<line {ends} style="{stroke("var(--soft)", "4 4", 1)}"/>')
    shares = [[count / (sum(one.count) or 1) for count in one.count] for one in series]
    most = max(map(max, shares)) or 1
    base = height - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for number, one in enumerate(series):
        share = shares[number]
        bins = zip(one.count, one.confidence, one.accuracy, share, strict=True)
        used = [(c, a, s) for n, c, a, s in bins if n >= MIN_COUNT]
        placed = [place(c, a) for c, a, _ in used]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        style = f"fill:none;{stroke(one.color, one.dashes, 1.5)}"
        parts.append(
            f'<polyline points="{path}" style="{style}"><title>{text(one.name)}</title></polyline>'
        )
        for (x, y), (c, a, s) in zip(placed, used, strict=True):
            tooltip = text(
                f"{one.name}: {100 * s:.1f} % of images, "
                f"confidence {100 * c:.1f} %, accuracy {100 * a:.1f} %"
            )
            place_and_size = f'cx="{x:.1f}" cy="{y:.1f}" r="{1.2 + 6 * math.sqrt(s):.1f}"'
            style = f"fill:{one.color};opacity:0.8"
            parts.append(
                f'<circle {place_and_size} style="{style}"><title>{tooltip}</title></circle>'
            )
        width = (WIDTH - LEFT - RIGHT) / len(share)
        each = (width - 2) / len(series)
        for i, one_share in enumerate(share):
            tall = one_share / most * COLUMNS_HEIGHT
            if tall >= 0.05:
                start = LEFT + i * width + 1 + number * each
                corner = f'x="{start:.2f}" y="{base - tall:.1f}"'
                size = f'width="{each:.2f}" height="{tall:.1f}"'
                parts.append(f'<rect {corner} {size} style="fill:{one.color}"/>')
    for value in axis:
        x, _ = place(value, 0)
        parts.append(_label(f"{x:.1f}", base + 16, "middle", f"{100 * value:.0f}"))
    parts.append(_label(LEFT - 6, base - COLUMNS_HEIGHT + 5, "end", f"{100 * most:.0f} %"))
    parts.append(_label(LEFT - 6, base + 3, "end", "0 %"))
    parts.append(f'<text x="{LEFT + 4}" y="{TOP + 11}">accuracy, %</text>')
    parts.append(f'<text x="{LEFT + 4}" y="{base - COLUMNS_HEIGHT - 4}">share of the images</text>')
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, height - 5, "middle", "confidence, %"))
    return figure(heading, unit, height, parts)


def _label(x: object, y: object, anchor: str, words: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def _clip(value: float) -> float:
    return min(max(value, 0.0), 100.0) if math.isfinite(value) else 0.0


def _placer(
    x_ticks: Sequence[float], y_ticks: Sequence[float], height: float
) -> Callable[[float, float], tuple[float, float]]:
    """Return a function from values to coordinates in the drawing."""

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        from_left = LEFT + across * (WIDTH - LEFT - RIGHT)
        return from_left, height - BOTTOM - up * (height - TOP - BOTTOM)

    return place


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    place: Callable[[float, float], tuple[float, float]],
    height: float,
    x_label: str,
    with_x: bool = True,
) -> list[str]:
    """Draw grid lines, ticks and labels. Without an x axis, y is a share and shown in percent."""
    parts = []
    scale = 1 if with_x else 100
    for y in y_ticks:
        _, at = place(x_ticks[0], y)
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(_label(LEFT - 6, f"{at + 4:.1f}", "end", _tick(scale * y)))
    if with_x:
        for x in x_ticks:
            at, _ = place(x, y_ticks[0])
            # Half a digit is about 3.5 units wide; the last label stays inside the drawing.
            at = min(at, WIDTH - 3.5 * len(_tick(x)))
            parts.append(_label(f"{at:.1f}", height - BOTTOM + 16, "middle", _tick(x)))
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(_label(middle, height - 5, "middle", text(x_label)))
    return parts


def _tick(value: float) -> str:
    """Format a number short enough for the margin: 25,000 is 25k."""
    size = abs(value)
    for limit, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}" if size >= 1e-3 or not size else f"{value:.0e}"


def figure(heading: str, unit: str, height: float, parts: Sequence[str]) -> str:
    """Put the elements of a drawing, WIDTH units wide, into a figure with a caption."""
    label = text(f"{heading}, {unit}" if unit else heading)
    caption = text(heading) + (f" <small>{text(unit)}</small>" if unit else "")
    box = f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}"'
    svg = f"<svg {box}>{''.join(parts)}</svg>"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"
