"""`dad-fast average`: options and help."""

from __future__ import annotations

from dad_fast.cli.parser import Parser, add_settings, options_parser, typed_options, typed_settings
from dad_fast.cli.screen import fill, option_lines, settings_for, wants_help
from dad_fast.config.options import AverageOptions
from dad_fast.errors import UsageError

SUMMARY = "average the weights of several students, or interpolate with their start"

HELP = """\
usage: dad-fast average A B ... -o DIR [--weights W ...]
       dad-fast average A [B ...] --interpolate START -o DIR [--suite NAME ...] [--alpha A]

Write the mean of the weights of students of one architecture and class list (a soup), such as runs
of several seeds from one initial model. With --interpolate, evaluate (1 - alpha) START + alpha
AVERAGE on test sets first (WiSE-FT): the first suite stands for in-distribution. A, B and START are
runs' folders, checkpoints' folders or .safetensors files. DIR gets model.safetensors, which eval,
predict, export and --init-from take, and average.json.

flags:
{settings}
{flags}

examples:
  dad-fast average runs/out/dad/seed-0 runs/out/dad/seed-1 -o runs/soup
  dad-fast average runs/dad --interpolate runs/start --suite val sketch=/data/sketch -o runs/wise
"""

# Settings that it uses, with a help text.
SETTINGS = {
    "data.data_dir": "images; batch norm is then estimated on their training split [A's own data]",
    "data.train_split": "the split for batch norm",
    "eval.suites": "what to evaluate on, the in-distribution suite first [A's own]",
    "data.val_split": "the split that stands for no --suite",
    "data.batch_size": "images per batch",
    "data.workers": "",
    "device": "",
}
ALONE = {"eval.suites": "--suite", "data.val_split": "--val-split"}


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        shown = settings_for(SETTINGS)
        print(fill(HELP, settings=shown, flags=option_lines(AverageOptions)))
        return 0
    given = vars(make_parser().parse(arguments))
    options, flags = typed_options(AverageOptions, given), typed_settings(given)
    if not options.output:
        raise UsageError("name the new folder: -o DIR")
    if len(options.models) < (1 if options.interpolate else 2):
        raise UsageError(
            "nothing to average: name two models or more, or one and --interpolate START "
            "(see dad-fast average -h)"
        )
    for path, flag in ALONE.items():
        if path in flags and not options.interpolate:
            raise UsageError(
                f"{flag} goes with --interpolate; evaluate an average with dad-fast eval "
                f"{options.output}"
            )
    from dad_fast.tools.average import run as command

    return command.run(options, flags)


def make_parser() -> Parser:
    parser = options_parser("average", AverageOptions, intermixed=True)
    add_settings(parser, SETTINGS)
    return parser
