"""Facts of this machine for programs (`doctor --json`) and for a bug report: no paths, no names."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from dad_fast import __version__
from dad_fast.loggers.environment import environment
from dad_fast.tools.doctor.row import Row, columns

BACK_ENDS = ("csrc", "csrc, CUDA", "triton", "apex", "dali", "xformers", "driver")


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the whole report: `ok`, `rows` and `environment`."""
    return {
        "ok": all(row.state == "ok" for row in rows if row.required),
        "rows": [row._asdict() for row in rows],
        "environment": {"dad_fast": __version__, **environment()},
    }


def bug_report(rows: Sequence[Row]) -> list[str]:
    """Return lines to paste into a bug report, indented as Markdown's code.

    Details of rows are left out: they may hold paths.
    """
    facts = environment()
    packages = {name: version for name, version in facts["packages"].items() if name != "dad-fast"}
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in facts["gpus"]]
    states = {row.component: row.state for row in rows}
    wrong = [name for name, state in states.items() if state == "wrong"]
    lines = [
        f"dad-fast {__version__}, commit {facts['git'] or 'of a package'}",
        f"Python {facts['python']}, {facts['platform']}",
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        f"CPU {facts['cpu']}, {facts['cpus']} cores",
        f"GPU {'; '.join(gpus) or 'none'}; CUDA {facts['cuda']}, driver {facts['driver']}",
        "back ends: " + ", ".join(f"{name} {states[name]}" for name in BACK_ENDS if name in states),
        "wrong: " + (", ".join(wrong) or "nothing"),
    ]
    return [
        wrapped
        for line in lines
        for wrapped in textwrap.wrap(
            line,
            columns(),
            initial_indent=" " * 4,
            subsequent_indent=" " * 6,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
