"""`dad-fast fit-discretizer`: options and help."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import options_parser, typed_options
from dad_fast.cli.screen import fill, option_lines, wants_help
from dad_fast.config.options_fit import FitOptions
from dad_fast.errors import UsageError

MOST_CODES = 1 << 16
SUMMARY = "train a small VQ autoencoder on your own images, for --discretizer"

HELP = """\
usage: dad-fast fit-discretizer --data-dir DIR -o FILE.safetensors [flags]

Train a discretizer for a domain that no published VQGAN has seen: a VQ autoencoder of this
project's VQGAN classes, by reconstruction (L1 + L2) and commitment, with a codebook of moving
averages and restarts of dead codes. Labels are not used. FILE-fit/ gets the log, checkpoints and
sheet.png with originals and reconstructions.

flags:
{flags}

examples:
  dad-fast fit-discretizer --data-dir embedded:digits -o vq.safetensors --epochs 5
  dad-fast train --preset demo --method dad --discretizer vq.safetensors -o runs/own-codes
  dad-fast fit-discretizer --data-dir DIR --levels 8,5,5,5 -o fsq.safetensors
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(fill(HELP, flags=option_lines(FitOptions)))
        return 0
    options = parse(arguments)
    from dad_fast.tools.fit_discretizer import run as fit_discretizer

    return fit_discretizer.run(options)


def parse(arguments: Sequence[str]) -> FitOptions:
    """Return the options. Raises UsageError."""
    parser = options_parser("fit-discretizer", FitOptions)
    options = typed_options(FitOptions, vars(parser.parse(arguments)))
    if not options.data_dir:
        raise UsageError("images are needed: add --data-dir (a folder, shards or embedded:digits)")
    if not options.output.endswith(".safetensors"):
        raise UsageError(f"--output {options.output or '(none)'}: name a .safetensors file")
    if options.width % 4:
        raise UsageError(f"--width {options.width}: must be a multiple of 4")
    if options.codes > MOST_CODES:
        raise UsageError(f"--codes {options.codes}: at most {MOST_CODES:,}")
    if options.val_fraction and not options.val_split:
        raise UsageError('--val-fraction holds images out and --val-split "" none: leave one out')
    if options.resume not in ("", "auto"):
        raise UsageError(f"--resume {options.resume}: must be auto")
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite contradict each other: leave one out")
    return options
