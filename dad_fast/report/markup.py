"""Components of an HTML page: escaped text, sections, tables, notes, and the frame around them. The page loads nothing and runs nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from html import escape
from pathlib import Path
from typing import Any

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
"""
# Override the order of what follows them: an honest name has no use for them, and a name with one can pose as another.
BIDI_CONTROLS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
NUM_COLORS, NUM_DASHES = 8, 3
DASHES = ("", "6 3", "2 3")


def document(title: str, content: Sequence[str]) -> str:
    """The whole page; `title` is plain text, `content` is HTML."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        HEAD.format(title=text(title), style=style)
        + "\n".join(part for part in content if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """`value` as HTML text or attribute: escaped, one line, control and direction characters made visible as \\xNN or \\uNNNN."""
    return escape("".join(map(_visible, str(value))))


def preformatted(value: str) -> str:
    """As `text`, with line breaks and tabs kept."""
    return "\n".join("\t".join(map(text, line.split("\t"))) for line in value.splitlines())


def _visible(character: str) -> str:
    if character not in BIDI_CONTROLS and unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def section(heading: str, *content: str) -> str:
    """Nothing where there is no content."""
    kept = [part for part in content if part]
    return (
        f'<section id="{_anchor(heading)}">\n<h2>{text(heading)}</h2>\n'
        + "\n".join(kept)
        + "\n</section>"
        if kept
        else ""
    )


def contents(headings: Sequence[str]) -> str:
    """Links to the sections of these headings."""
    links = (
        f'<a href="#{_anchor(heading)}">{text(heading.partition(":")[0])}</a>'
        for heading in headings
    )
    return f'<nav aria-label="contents">{"".join(links)}</nav>'


def _anchor(heading: str) -> str:
    return "-".join(re.findall("[a-z]+", heading.lower()))


def notes(lines: Sequence[str], kind: str = "notes") -> str:
    """A list; what stands in backticks, as in markdown, becomes code."""
    if not lines:
        return ""
    items = (re.sub("`(.*?)`", r"<code>\1</code>", text(line)) for line in lines)
    return f'<ul class="{kind}">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def table(
    header: Sequence[str],
    body: Sequence[Sequence[str]],
    best: Collection[tuple[int, int]] = (),
    caption: str = "",
) -> str:
    """Names in the first column, which stays in view while the rest scrolls; numbers in the others."""
    head = "".join(f'<th scope="col">{_heading(name)}</th>' for name in header)
    lines = [f"<thead><tr>{head}</tr></thead><tbody>"]
    for i, row in enumerate(body):
        cells = "".join(
            f"<td{' class=best' if (i, j) in best else ''}>{text(cell)}</td>"
            for j, cell in enumerate(row[1:], start=1)
        )
        lines.append(f'<tr><th scope="row">{text(row[0])}</th>{cells}</tr>')
    return _scrolled("table", lines, caption)


def comparison(
    names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], caption: str = ""
) -> str:
    """One column per name; a row whose values are all the same shows its value once, and if all rows are such, names are not needed."""
    if not rows:
        return ""
    shown = len(names) > 1 and any(len(set(values)) > 1 for _, values in rows)
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    lines = [f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>' if shown else "<tbody>"]
    for name, values in rows:
        same = len(set(values)) == 1
        span = f' colspan="{len(names)}"' if same and shown else ""
        cells = (
            f"<td{span}>{text(values[0])}</td>"
            if same
            else "".join(f"<td>{text(value)}</td>" for value in values)
        )
        lines.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    return _scrolled("table class=words", lines, caption)


def _scrolled(tag: str, lines: Sequence[str], caption: str) -> str:
    """A table in a box that scrolls by itself, by keyboard as well, so that the page never does."""
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    label = text(caption or "table")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><{tag}>{named}{"".join(lines)}</tbody></table></div>'


def _heading(name: str) -> str:
    """A column's heading, which may break after an underscore only."""
    return text(name).replace(" ", "&nbsp;").replace("_", "_<wbr>")


def grid(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def details(summary: str, content: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{content}</details>" if content else ""


def legend(items: Sequence[tuple[str, str, str]]) -> str:
    """(name, colour, dashes) of each, drawn as the charts draw it."""
    line = '<svg viewBox="0 0 24 8" aria-hidden="true"><line x1="0" x2="24" y1="4" y2="4" style="{}"/></svg>'
    entries = (
        f"<span>{line.format(stroke(color, dashes, 4))}{text(name)}</span>"
        for name, color, dashes in items
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def stroke(color: str, dashes: str, width: float = 2) -> str:
    return f"stroke:{color};stroke-width:{width:g}" + (
        f";stroke-dasharray:{dashes}" if dashes else ""
    )


def look(number: int) -> tuple[str, str]:
    """Colour and dashes of the `number`-th of several: eight colours, then the same ones dashed."""
    return f"var(--c{number % NUM_COLORS})", DASHES[number // NUM_COLORS % NUM_DASHES]


def numbers(values: Sequence[Any], form: Callable[[float], str], empty: str = "–") -> str:
    """`form` of the mean of the values that there are."""
    found = [float(value) for value in values if value is not None]
    return form(sum(found) / len(found)) if found else empty
