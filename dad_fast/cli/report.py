"""Flags of `dad-fast report`."""

from __future__ import annotations

from dad_fast.cli.parser import Intermixed, wants_help
from dad_fast.errors import UsageError

SUMMARY = "one HTML page about runs, side by side: results, calibration, curves, images, cost"

HELP = """\
usage: dad-fast report RUN [RUN ...] [-o FILE.html]

Makes one self-contained HTML page of runs: what was trained on what, results per shift with
95 % intervals, reliability diagrams, curves, images (clean, discretized, attacked, their
difference, changed codes), throughput, energy, time against KD, environment. Several runs stand
side by side, with the settings that differ. It opens anywhere: no network, no scripts.

RUN is a run's folder or a comparison's (the folder given to dad-fast train -o). Folders
DIR/seed-0 DIR/seed-1 are the seeds of one column. A run in progress is shown as far as it is;
what is missing or damaged is named on the page. RUN may be a file of dad-fast eval --json, too.

flags:
  -o, --output FILE   the page; an earlier one is replaced [of one RUN: RUN/report.html;
                      of several: runs/report.html]
  --debug             show tracebacks

examples:
  dad-fast report runs/demo
  dad-fast report runs/demo/kd runs/demo/dad/seed-0 -o compared.html
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(HELP, end="")
        return 0
    parser = Intermixed("report")
    parser.add_argument("runs", nargs="*", default=[])
    parser.add_argument("-o", "--output", default="")
    given = parser.parse(arguments)
    if not given.runs:
        raise UsageError("no run: dad-fast report RUN [RUN ...] (see dad-fast report -h)")
    from dad_fast.report import run as report

    return report.run(given.runs, given.output)
