"""Colour and dashes of each group of a page. The colour is the method's, on every page."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

from dad_fast.report.runs import Group

# Numbers of the colours in report.css.
COLORS = {
    "kd": 0,
    "dat": 1,
    "dad": 2,
    "dat+dad": 3,
    "aug-only": 4,
    "ce": 6,
    "lp-clip": 7,
}
# Of methods that other packages add, by a checksum of the name.
OTHER_COLORS = (5, 8, 9, 10)
DASHES = ("", "6 3", "2 3", "9 3 2 3")
# Colour and dashes.
Look = tuple[str, str]
TEACHER: Look = ("var(--soft)", "")


def looks(groups: Sequence[Group]) -> dict[str, Look]:
    """Return the look of each group by its label.

    Groups of one method have its colour and differ in dashes, then in lightness.
    """
    found: dict[str, Look] = {}
    seen: Counter[int] = Counter()
    for group in groups:
        number = color_number(group.method)
        shade, dashes = divmod(seen[number], len(DASHES))
        seen[number] += 1
        color = f"var(--c{number})"
        if shade:
            # Darker in light mode, lighter in dark mode, so that contrast does not fall.
            color = f"color-mix(in srgb, {color} {100 // (shade + 1)}%, var(--text))"
        found[group.label] = (color, DASHES[dashes])
    return found


def color_number(method: str) -> int:
    """Return the number of the method's colour in report.css."""
    other = OTHER_COLORS[zlib.crc32(method.encode(errors="replace")) % len(OTHER_COLORS)]
    return COLORS.get(method, other)
