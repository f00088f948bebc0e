"""Write tables of the docs from the registries: methods, terms, distances; teachers.

    python scripts/registry_tables.py

A test compares the pages with the registries.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a bare checkout too

from dad_fast.config.fields import settings
from dad_fast.methods.registry import DISTANCES, METHODS, Images, Term
from dad_fast.models.registry import FORMS, TEACHERS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "methods.md", DOCS / "models.md")
SYMBOLS = {Images.CLEAN: "x", Images.ATTACK_TEACHER: "Q(x')", Images.ATTACK_STUDENT: "Q(x'')"}


def formula(term: Term) -> str:
    """Return a term as text, such as D(s(Q(x')), t(x))."""
    student = f"s({SYMBOLS[term.images]})"
    if term.teacher_images is None:
        return f"CE({student}, y)"
    return f"D({student}, t({SYMBOLS[term.teacher_images]}))"


def tables(page: Path) -> dict[str, str]:
    """Return the tables of a page by the mark of their place in it."""
    return _of_methods() if page.name == "methods.md" else _of_models()


def _of_models() -> dict[str, str]:
    forms = [form for name in TEACHERS.own_names() for form in FORMS[name]]
    rows = [(f"`{form.text}`", form.summary) for form in forms]
    return {"teachers": _table(("`--teacher`", "teacher"), rows)}


def _of_methods() -> dict[str, str]:
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


def with_tables(page: Path) -> str:
    """Return a page's text with its tables made anew. Raises ValueError for a missing place."""
    text = page.read_text(encoding="utf-8")
    for mark, table in tables(page).items():
        start, end = f"<!-- registry, {mark} -->\n", "<!-- end -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        made = f"{start}\n{table}\n\n{end}"
        text, count = re.subn(pattern, lambda _, made=made: made, text, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{page.name} has {count} places for the table {mark!r}")
    return text


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")
