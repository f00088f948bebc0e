"""`dad-fast report`: one HTML page of one or more run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dad_fast.errors import UsageError
from dad_fast.files import atomic_write_text
from dad_fast.loggers.run_log import print_line
from dad_fast.report.page import page
from dad_fast.report.runs import load


def run(folders: Sequence[str], output: str) -> int:
    """Write the page and return the exit code.

    Prints the page's path to stdout. Missing and damaged files go to stderr and onto the page.
    """
    if output:
        target = Path(output)
    elif len(set(folders)) == 1:
        target = Path(folders[0]) / "report.html"
    else:
        target = Path("runs/report.html")
    if target.is_dir():
        raise UsageError(
            f"--output {target} is a folder; name the page, such as {target / 'report.html'}"
        )
    if target.suffix not in (".html", ".htm"):
        raise UsageError(f"--output {target}: the page's name ends in .html")
    loaded = load(folders)
    atomic_write_text(target, page(loaded))
    for problem in loaded.problems:
        print_line(f"dad-fast: {problem}")
    print(target)
    return 0
