"""Print stage times and gaps of a profile.

    scripts/nsys_summary.py FILE.sqlite     of nsys export
    scripts/nsys_summary.py trace.json.gz   of dad-fast profile torch

Needs no packages. `--json` prints the numbers as JSON. Tested on synthetic exports; not yet run on
one from a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dad_fast.errors import DataError
from dad_fast.tools.profile.timeline import as_text, read_timeline, summarize


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--top", type=int, default=10, help="how many kernels to list [10]")
    given = parser.parse_args(arguments)
    try:
        summary = summarize(read_timeline(given.file))
    except DataError as error:
        print(f"nsys_summary: {error}", file=sys.stderr)
        return error.exit_code
    if given.json:
        gaps = [gap._asdict() for gap in summary.gaps]
        print(json.dumps(dataclasses.asdict(summary) | {"gaps": gaps}, indent=1))
    else:
        print(as_text(summary, given.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
