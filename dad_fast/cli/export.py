"""`dad-fast export`: options and help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dad_fast.cli.parser import options_parser, typed_options
from dad_fast.cli.screen import fill, option_lines, wants_help
from dad_fast.config.fields import nearest
from dad_fast.config.options import ExportOptions
from dad_fast.errors import UsageError

SUMMARY = "export a student: timm's files, ONNX, torch.export, with a model card"
FORMATS = ("timm", "onnx", "torch")

HELP = """\
usage: dad-fast export CKPT -o DIR [--format NAME ...] [--weights ema|raw] [--overwrite]
                       [--push USER/REPO]

Write a trained student into a new folder, without the optimizations of its training.
Each file is read back and compared with the student; a file that differs is deleted.
CKPT is a run's folder, a checkpoint's folder or a model.safetensors.

  timm     model.safetensors and config.json, for timm.create_model("local-dir:DIR")
  onnx     model.onnx: pixels [batch, 3, H, W] in [0, 1] to logits, normalisation inside
  torch    model.pt2: the same as a program of torch.export

The folder also gets README.md, the model card, and export.json, the files and their checks.

flags:
{flags}

examples:
  dad-fast export runs/demo/dad/seed-0 -o runs/demo-export
  dad-fast export runs/demo/dad/seed-0 -o runs/demo-all --format timm onnx torch
  dad-fast predict runs/demo-export photo.jpg
  dad-fast export runs/demo/dad/seed-0 -o runs/demo-hub --push USER/REPO
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(fill(HELP, flags=option_lines(ExportOptions)))
        return 0
    options = parse(arguments)
    from dad_fast.tools.export import run as export

    return export.run(options)


def parse(arguments: Sequence[str]) -> ExportOptions:
    """Return the options. Raises UsageError."""
    parser = options_parser("export", ExportOptions, intermixed=True)
    options = typed_options(ExportOptions, vars(parser.parse(arguments)))
    if not options.checkpoint:
        raise UsageError(
            "nothing to export: name a run's folder or a model.safetensors before the flags "
            "(see dad-fast export -h)"
        )
    if not options.output:
        raise UsageError("name the new folder: -o DIR")
    return replace(options, formats=check_formats(options.formats))


def check_formats(names: Sequence[str]) -> tuple[str, ...]:
    """Return each format once. Raises UsageError for an unknown one."""
    for name in names:
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            raise UsageError(f"--format {name}: must be one of {known}{nearest(name, FORMATS)}")
    return tuple(dict.fromkeys(names))
