"""Write the tables of docs/methods.md from the registries: methods, terms, distances.

    python scripts/methods_tables.py

A test compares the page with the registries.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a bare checkout too

from dad_fast.config.fields import settings
from dad_fast.methods.registry import DISTANCES, METHODS, Images, Term

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
SYMBOLS = {Images.CLEAN: "x", Images.ATTACK_TEACHER: "Q(x')", Images.ATTACK_STUDENT: "Q(x'')"}


def formula(term: Term) -> str:
    """Return a term as text, such as D(s(Q(x')), t(x))."""
    student = f"s({SYMBOLS[term.images]})"
    if term.teacher_images is None:
        return f"CE({student}, y)"
    return f"D({student}, t({SYMBOLS[term.teacher_images]}))"


def tables() -> dict[str, str]:
    """Return the tables by the mark of their place in the page."""
    methods = [METHODS[name] for name in METHODS.own_names()]
    terms: dict[str, Term] = {}
    rows = []
    for method in methods:
        terms |= {term.name: term for term in method.terms}
        loss = " + ".join(f"{term.name} {formula(term)}" for term in method.terms)
        stores = ", ".join(method.store_kinds)
        loss = loss or "its own ([LP-CLIP](lp-clip.md))"
        rows.append((f"`{method.name}`", method.summary, loss, stores, method.card_text))
    flags = {path: setting.flag for path, setting in settings().items()}
    return {
        "methods": _table(("`--method`", "what it is", "loss", "stores", "source"), rows),
        "terms": _table(
            ("term", "formula", "weight", "default", "filtered"),
            [
                (
                    f"`{term.name}`",
                    formula(term),
                    f"`{flags[str(term.weight)]}`",
                    f"{settings()[str(term.weight)].default:g}",
                    "yes" if term.filtered else "",
                )
                for term in terms.values()
            ],
        ),
        "distances": _table(
            ("`--distance`", "what it is", "formula, a mean over the batch", "source"),
            [
                (f"`{name}`", found.summary, found.formula, found.source)
                for name, found in ((name, DISTANCES[name]) for name in DISTANCES.own_names())
            ],
        ),
    }


def with_tables(page: str) -> str:
    """Return the page with its tables made anew. Raises ValueError for a missing place."""
    for mark, table in tables().items():
        start, end = f"<!-- registry, {mark} -->\n", "<!-- end -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        made = f"{start}\n{table}\n\n{end}"
        page, count = re.subn(pattern, lambda _, made=made: made, page, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for the table {mark!r}")
    return page


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
