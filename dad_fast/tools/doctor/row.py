"""A line of a report of `dad-fast doctor`."""

from __future__ import annotations

import textwrap
from typing import Literal, NamedTuple

WIDTH = 100


class Row(NamedTuple):
    """`state`: ok, off (not here, and nothing is broken by that) or wrong. Only a required row that is not ok fails doctor."""

    component: str
    state: Literal["ok", "off", "wrong"]
    detail: str
    mend: str = ""
    required: bool = False


def render(row: Row) -> str:
    lead = f"{row.state:<6} {row.component:<18} "
    text = textwrap.fill(
        row.detail,
        WIDTH,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
    )
    if row.mend:
        text += "\n" + textwrap.fill(
            f"mend: {row.mend}",
            WIDTH,
            initial_indent=" " * len(lead),
            subsequent_indent=" " * len(lead),
        )
    return text
