"""Flags of `dad-fast export`."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import Intermixed, wants_help
from dad_fast.config.fields import nearest
from dad_fast.config.options import ExportOptions
from dad_fast.errors import UsageError

SUMMARY = "hand a student over: timm's files, ONNX, torch.export, with a model card"
FORMATS = ("timm", "onnx", "torch")

HELP = """\
usage: dad-fast export CKPT -o DIR [--format NAME ...] [--weights ema|raw] [--overwrite]

Writes a trained student into a new folder, plain: whatever sped up its training is left behind.
Each file is read back and compared with the student; one that differs is not kept.
CKPT is a run's folder, a checkpoint's folder or a model.safetensors.

  timm     model.safetensors and config.json, for timm.create_model("local-dir:DIR")
  onnx     model.onnx: pixels [batch, 3, H, W] in [0, 1] to logits, normalisation inside
  torch    model.pt2: the same as a program of torch.export

Beside them: README.md, the model card, and export.json, what was written and how it was checked.

flags:
  -o, --output DIR       the new folder
  --format NAME ...      timm, onnx, torch [timm; onnx for a linear probe]
  --weights ema|raw      the run's EMA, or the weights as the optimizer left them, from the latest
                         checkpoint [those that evaluation uses]
  --overwrite            replace an earlier export
  --debug                show tracebacks

examples:
  dad-fast export runs/demo/dad/seed-0 -o runs/demo-export
  dad-fast export runs/demo/dad/seed-0 -o runs/demo-all --format timm onnx torch
  dad-fast predict runs/demo-export photo.jpg
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(HELP, end="")
        return 0
    options = parse(arguments)
    from dad_fast.tools.export import run as export

    return export.run(options)


def parse(arguments: Sequence[str]) -> ExportOptions:
    """Raises UsageError."""
    parser = Intermixed("export")
    parser.add_argument("checkpoint", nargs="?", default="")
    parser.add_argument("-o", "--output", default="")
    parser.add_argument("--format", dest="formats", nargs="+", action="extend", default=[])
    parser.add_argument("--weights", choices=("ema", "raw"), default="")
    parser.add_argument("--overwrite", action="store_true", default=False)
    given = parser.parse(arguments)
    if not given.checkpoint:
        raise UsageError(
            "nothing to export: name a run's folder or a model.safetensors before the flags (see dad-fast export -h)"
        )
    if not given.output:
        raise UsageError("name the new folder: -o DIR")
    formats = tuple(
        dict.fromkeys(name for text in given.formats for name in text.split(",") if name)
    )
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UsageError(
            f"--format {unknown[0]}: there are {', '.join(FORMATS)}{nearest(unknown[0], FORMATS)}"
        )
    return ExportOptions(**{**vars(given), "formats": formats})
