"""`dad-fast doctor`: options and help."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import options_parser, typed_options
from dad_fast.cli.screen import fill, option_lines, wants_help
from dad_fast.config.options import DoctorOptions
from dad_fast.errors import UsageError

SUMMARY = "check this machine, a data set (--data) or a weights file (--weights)"

HELP = """\
usage: dad-fast doctor [--numerics] [--json]
       dad-fast doctor --data DIR [--split NAME] [--class-map FILE] [--loader NAME] [--need N]
       dad-fast doctor --weights FILE

Report which features are available on this machine, and how to fix what is missing. Exit code 0,
or 3 if something required is missing or broken. The last lines are for a bug report.
With --data, check a data set instead: classes, bad files, formats, sizes, and the decoding speed of
each back end. DIR is any name of train --data-dir. Exit code 0, or 4 if training cannot use the
data.
With --weights, name a weights file by its SHA-256 (docs/weights.md), or describe its content. Exit
code 0, or 4 for a file that cannot be read.

flags:
{flags}

examples:
  dad-fast doctor --weights vqgan.ckpt
  dad-fast doctor --data /data/imagenet
  dad-fast doctor --data '/data/in1k/train-{000000..000099}.tar' --need 4000
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(fill(HELP, flags=option_lines(DoctorOptions)))
        return 0
    options = parse(arguments)
    if options.weights:
        from dad_fast.tools.doctor import weights

        return weights.run(options.weights)
    if options.data:
        from dad_fast.tools.doctor import data as doctor_data

        return doctor_data.run(options)
    from dad_fast.tools.doctor import run as doctor

    return doctor.run(options.numerics, options.json)


def parse(arguments: Sequence[str]) -> DoctorOptions:
    """Return the options. Raises UsageError."""
    parser = options_parser("doctor", DoctorOptions)
    options = typed_options(DoctorOptions, vars(parser.parse(arguments)))
    of_machine = DoctorOptions(numerics=options.numerics, json=options.json)
    if options.weights and options != DoctorOptions(weights=options.weights):
        raise UsageError("--weights describes one file: leave the other flags out")
    if options.data and options.numerics:
        raise UsageError("--data checks a data set and --numerics this machine: leave one out")
    if options.data and options.json:
        raise UsageError("--json reports on this machine: leave --data or --json out")
    if not options.data and not options.weights and options != of_machine:
        raise UsageError("--split, --class-map, --loader and --need go with --data DIR")
    return options
