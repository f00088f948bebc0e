"""`dad-fast predict`: options and help."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import options_parser, typed_options
from dad_fast.cli.screen import fill, option_lines, wants_help
from dad_fast.config.options import PredictOptions
from dad_fast.errors import UsageError

SUMMARY = "classify images with a trained or exported student"

HELP = """\
usage: dad-fast predict MODEL IMAGE [IMAGE ...] [--top K] [--json]

Print the most likely classes of each image, with the model's confidence.
MODEL is a run's folder, a checkpoint's folder, a model.safetensors, an exported folder or a .onnx,
or timm:NAME[@FILE], timm:hf-hub:REPO, open_clip:ARCH@FILE, open_clip:ARCH/TAG or hf-hub:REPO.
IMAGE is a file, a folder, which is searched with its sub-folders, or images of a data source, such
as hfds:NAME@test or parquet:FOLDER@test. Unreadable images are named and the others are classified;
the exit code is then 4.

flags:
{flags}

examples:
  dad-fast predict runs/demo/dad/seed-0 photo.jpg
  dad-fast predict runs/export/model.onnx photos --top 1
  dad-fast predict runs/export photos --json > predictions.jsonl
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(fill(HELP, flags=option_lines(PredictOptions)))
        return 0
    options = parse(arguments)
    from dad_fast.tools import predict

    return predict.run(options)


def parse(arguments: Sequence[str]) -> PredictOptions:
    """Return the options. Raises UsageError."""
    parser = options_parser("predict", PredictOptions, intermixed=True)
    options = typed_options(PredictOptions, vars(parser.parse(arguments)))
    if not options.model:
        raise UsageError(
            "name a model and images: dad-fast predict MODEL IMAGE ... (see dad-fast predict -h)"
        )
    if not options.images:
        raise UsageError(
            f"name images or a folder of them after {options.model}: "
            "dad-fast predict MODEL IMAGE ..."
        )
    return options
