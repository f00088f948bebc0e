"""HTML components of the report: escaped text, tables, notes, legends, and the page around them.

The frame is the template page.html. The page needs neither the network nor scripts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# These override the order of the characters after them, so that one name can pose as another.
BIDI_CONTROLS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def document(title: str, problems: Sequence[str], sections: Mapping[str, Sequence[str]]) -> str:
    """Render the whole page.

    title, problems: plain text. sections: heading (plain text) -> HTML fragments; a section
    without content is left out.
    """
    joined = {
        heading: "\n".join(filter(None, fragments)) for heading, fragments in sections.items()
    }
    template = _environment().get_template("page.html")
    return template.render(
        title=title,
        problems=notes(problems, "problems"),
        sections={heading: content for heading, content in joined.items() if content},
    )


def _environment() -> Environment:
    """Templates of this folder. Every value is made visible and escaped unless marked as safe."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["anchor"] = lambda heading: "-".join(re.findall("[a-z]+", heading.lower()))
    return environment


def text(value: object) -> str:
    """Escape `value` as HTML text or attribute, with control characters made visible."""
    return escape(visible(value))


def visible(value: object) -> str:
    """Return `value` on one line: control and direction characters become \\xNN or \\uNNNN."""
    return "".join(map(_visible_character, str(value)))


def _visible_character(character: str) -> str:
    if character not in BIDI_CONTROLS and unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def preformatted(value: str) -> str:
    """Escape like `text`, but keep line breaks and tabs."""
    return "\n".join("\t".join(map(text, line.split("\t"))) for line in value.splitlines())


def notes(lines: Sequence[str], kind: str = "notes") -> str:
    """Return a list of plain-text lines; text in backticks becomes code, as in markdown."""
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
    """Return a table: names in the first column, which stays in view, numbers in the others.

    best: (row, column) of the cells to emphasize.
    """
    head = "".join(f'<th scope="col">{_heading(name)}</th>' for name in header)
    lines = [f"<thead><tr>{head}</tr></thead><tbody>"]
    for i, row in enumerate(body):
        cells = "".join(
            f"<td{' class=best' if (i, j) in best else ''}>{text(cell)}</td>"
            for j, cell in enumerate(row[1:], start=1)
        )
        lines.append(f'<tr><th scope="row">{text(row[0])}</th>{cells}</tr>')
    return _scrolled("table", lines, caption)


def comparison(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table with one column per name.

    A row of equal values shows its value once. The names are left out if all rows are such.
    """
    if not rows:
        return ""
    with_names = len(names) > 1 and any(len(set(values)) > 1 for _, values in rows)
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    lines = ["<tbody>"]
    if with_names:
        lines = [f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>']
    span = f' colspan="{len(names)}"' if with_names else ""

    for name, values in rows:
        if len(set(values)) == 1:
            cells = f"<td{span}>{text(values[0])}</td>"
        else:
            cells = "".join(f"<td>{text(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    return _scrolled("table class=words", lines, "")


def _scrolled(tag: str, lines: Sequence[str], caption: str) -> str:
    """Put a table in a box that scrolls on its own, also by keyboard, so that the page does not."""
    named = f"<caption><span>{text(caption)}</span></caption>" if caption else ""
    label = text(caption or "table")
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    return f"{box}<{tag}>{named}{''.join(lines)}</tbody></table></div>"


def _heading(name: str) -> str:
    """Escape a column's heading, which may break after an underscore only."""
    return text(name).replace(" ", "&nbsp;").replace("_", "_<wbr>")


def grid(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def details(summary: str, content: str, is_open: bool = False) -> str:
    """Return content that is folded away below its summary; "" without content."""
    opened = " open" if is_open else ""
    shown = f"<details{opened}><summary>{text(summary)}</summary>{content}</details>"
    return shown if content else ""


def legend(items: Sequence[tuple[str, str, str]]) -> str:
    """Return the legend of (name, colour, dashes), drawn as the charts draw their lines."""
    entries = []
    for name, color, dashes in items:
        style = stroke(color, dashes, 4)
        line = f'<line x1="0" x2="24" y1="4" y2="4" style="{style}"/>'
        entries.append(
            f'<span><svg viewBox="0 0 24 8" aria-hidden="true">{line}</svg>{text(name)}</span>'
        )
    return f'<div class="legend">{"".join(entries)}</div>'


def stroke(color: str, dashes: str, width: float = 2) -> str:
    dashed = f";stroke-dasharray:{dashes}" if dashes else ""
    return f"stroke:{color};stroke-width:{width:g}{dashed}"


def numbers(values: Sequence[Any], form: Callable[[float], str], empty: str = "–") -> str:
    """Format the mean of the values that are not None; `empty` if there are none."""
    found = [float(value) for value in values if value is not None]
    return form(sum(found) / len(found)) if found else empty
