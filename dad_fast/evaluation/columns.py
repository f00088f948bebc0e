"""Tables of text that fit the terminal: columns are left out, and names cut, where it is narrow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

# Of a pipe or a file, which have no width: every column is shown.
UNLIMITED = 1000
SHORTEST_NAME = 10


def terminal_width() -> int:
    """Return the terminal's columns, or COLUMNS."""
    return shutil.get_terminal_size((UNLIMITED, 24)).columns


class Layout:
    """Columns of a table: title -> width, one space apart. The first is left-aligned, and cut last.

    spare: titles that are left out where the table is wider than `width`, the first one first.
    """

    def __init__(self, widths: Mapping[str, int], spare: Sequence[str], width: int) -> None:
        self.widths = dict(widths)
        self.left_out: list[str] = []
        for title in spare:
            if self.total <= width:
                break
            del self.widths[title]
            self.left_out.append(title)
        self.first = next(iter(self.widths))
        excess = max(0, self.total - width)
        self.widths[self.first] = max(SHORTEST_NAME, self.widths[self.first] - excess)
        self._cuts_names = excess > 0

    @property
    def total(self) -> int:
        return sum(self.widths.values()) + len(self.widths) - 1

    def header(self) -> str:
        return self.line({title: title for title in self.widths})

    def line(self, cells: Mapping[str, str]) -> str:
        """Return a row of the cells by title; those of columns that are left out are ignored."""
        name, width = cells[self.first], self.widths[self.first]
        if self._cuts_names and len(name) > width:
            name = f"{name[: width - 1]}…"
        others = [title for title in self.widths if title != self.first]
        return " ".join([f"{name:<{width}}", *(f"{cells[t]:>{self.widths[t]}}" for t in others)])

    def note(self) -> str:
        """Return a line about the columns that are left out; empty if there are none."""
        return f"no room for {', '.join(self.left_out)}: --json has all" if self.left_out else ""
