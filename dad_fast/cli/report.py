"""`dad-fast report`: options and help."""

from __future__ import annotations

from dad_fast.cli.parser import options_parser, typed_options
from dad_fast.cli.screen import fill, option_lines, wants_help
from dad_fast.config.options import ReportOptions
from dad_fast.errors import UsageError

SUMMARY = "one HTML page about runs, side by side: results, curves, images, cost"

HELP = """\
usage: dad-fast report RUN [RUN ...] [-o FILE.html]

Make one self-contained HTML page of runs: models and data, results per shift with 95 % intervals,
reliability diagrams, curves, images (clean, discretized, attacked, their difference, changed
codes), throughput, energy, time compared with KD, environment. Several runs stand side by side,
with the settings that differ. The page opens anywhere: no network, no scripts.

RUN is a run's folder, a comparison's (the folder given to dad-fast train -o), or a file of
dad-fast eval --json. Folders DIR/seed-0 DIR/seed-1 are the seeds of one column. Unfinished runs
are shown, too; the page names what is missing or damaged.

flags:
{flags}

examples:
  dad-fast report runs/demo
  dad-fast report runs/demo/kd runs/demo/dad/seed-0 -o compared.html
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(fill(HELP, flags=option_lines(ReportOptions)))
        return 0
    parser = options_parser("report", ReportOptions, intermixed=True)
    options = typed_options(ReportOptions, vars(parser.parse(arguments)))
    if not options.runs:
        raise UsageError("no run: dad-fast report RUN [RUN ...] (see dad-fast report -h)")
    from dad_fast.report import run as report

    return report.run(list(options.runs), options.output)
