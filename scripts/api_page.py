"""Write docs/api.md from the docstrings of the names in `dad_fast.__all__`.

    python scripts/api_page.py

A test compares the page with the docstrings.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a bare checkout too

import dad_fast as df

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
INTRODUCTION = """\
# Python API

`import dad_fast as df` is all that a script or a notebook needs;
[examples/digits.ipynb](../examples/digits.ipynb) uses most of it. Errors are classes of
`dad_fast.errors`, each with the problem, its place and the fix in one line; nothing here ends the
process. Under torchrun every process makes the same calls: `torchrun --nproc-per-node 8 script.py`.

This page is made from the docstrings by `scripts/api_page.py`.
"""
# The order of the page.
GROUPS = {
    "Train, evaluate, export": ("train", "Run", "evaluate", "export"),
    "Load": ("open_source", "load_teacher", "load_discretizer", "load_student"),
    "Attack and losses": ("PGD", "discretize", "losses"),
    "Models and stores": ("Teacher", "VQGAN", "AdversarialStore", "TargetStore"),
}


def markdown() -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    for title, names in GROUPS.items():
        lines.append(f"## {title}\n")
        for name in names:
            lines += _entry(name, getattr(df, name))
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, found: Any) -> Iterator[str]:
    yield f"### df.{name}\n"
    if isinstance(found, ModuleType):
        yield _text(found)
        for one in sorted(found.__all__):
            value = getattr(found, one)
            yield from (_signature(f"df.{name}.{one}", value), _text(value))
        return
    yield from (_signature(f"df.{name}", found), _text(found))
    if not inspect.isclass(found):
        return
    for attribute, value in vars(found).items():
        is_member = isinstance(value, property | classmethod) or inspect.isfunction(value)
        if attribute.startswith("_") or not is_member or not inspect.getdoc(value):
            continue
        whole = f"{name}.{attribute}"
        if isinstance(value, property):
            yield f"**`{whole}`**\n"
        else:
            yield _signature(whole, getattr(found, attribute))
        yield _text(value)


def _signature(name: str, value: Any) -> str:
    """Return a call in a code block, one argument a line where it is long."""
    signature = inspect.signature(value)
    arguments = []
    stars = False
    for argument in signature.parameters.values():
        if argument.name == "self":
            continue
        if argument.kind == argument.KEYWORD_ONLY and not stars:
            arguments.append("*")
            stars = True
        arguments.append(_argument(argument))
    has_return = signature.return_annotation is not signature.empty and not inspect.isclass(value)
    arrow = f" -> {_kind(signature.return_annotation)}" if has_return else ""
    call = f"{name}({', '.join(arguments)}){arrow}"
    if len(call) > 92:
        inside = "".join(f"    {argument},\n" for argument in arguments)
        call = f"{name}(\n{inside}){arrow}"
    return f"```\n{call}\n```\n"


def _argument(argument: inspect.Parameter) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(argument.kind.name, "")
    kind = "" if argument.annotation is argument.empty else f": {_kind(argument.annotation)}"
    default = "" if argument.default is argument.empty else f" = {argument.default!r}"
    return f"{stars}{argument.name}{kind}{default}"


def _kind(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else annotation.__name__


def _text(value: Any) -> str:
    """Return a docstring as markdown: its sections as lists, its indented blocks as code."""
    lines: list[str] = []
    in_section = False
    for line in inspect.cleandoc(value.__doc__ or "").splitlines():
        if heading := re.fullmatch(r"(Args|Returns|Raises):", line):
            in_section = True
            lines += [f"**{heading[1]}**", ""]
        elif in_section and (entry := re.fullmatch(r"    (\*{0,2}\w+(?:, \w+)*): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif in_section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        elif in_section:
            lines.append(line.strip())
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
    print(PAGE)
