"""One line of the report of `dad-fast doctor`."""

from __future__ import annotations

import shutil
import textwrap
from typing import Literal, NamedTuple

WIDTH = 100


def columns() -> int:
    """Return the width of the report: that of the terminal, from 60 to WIDTH."""
    return min(WIDTH, max(60, shutil.get_terminal_size((WIDTH, 50)).columns))


class Row(NamedTuple):
    """One line of the report.

    `state`: ok, off (missing, and nothing breaks without it) or wrong. doctor fails only if a
    required row is not ok.
    """

    component: str
    state: Literal["ok", "off", "wrong"]
    detail: str
    fix: str = ""
    required: bool = False


def render(row: Row, *, whole_words: bool = False) -> str:
    """Format a row. whole_words: do not break at hyphens, such as those of a path to be copied."""
    lead = f"{row.state:<6} {row.component:<18} "
    text = textwrap.fill(
        row.detail,
        columns(),
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=not whole_words,
    )
    if row.fix:
        text += "\n" + textwrap.fill(
            f"fix: {row.fix}",
            columns(),
            initial_indent=" " * len(lead),
            subsequent_indent=" " * len(lead),
        )
    return text
