"""Flags of `dad-fast predict`."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import Intermixed, wants_help
from dad_fast.config.options import PredictOptions
from dad_fast.errors import UsageError

SUMMARY = "name what images show, with a trained or an exported student"

HELP = """\
usage: dad-fast predict MODEL IMAGE [IMAGE ...] [--top K] [--json]

Prints the likeliest classes of each image, and how confident the model is.
MODEL is a run's folder, a checkpoint's folder, a model.safetensors, an exported folder or a .onnx.
IMAGE is a file or a folder, which is searched with its sub-folders. An image that cannot be read
is named, the others are predicted; the exit code is then 4.

flags:
  -k, --top K             how many classes [5]
  --json                  one JSON object a line: image, predictions (class, folder, name,
                          confidence) or error
  -b, --batch-size N      images per batch [32]
  --device NAME           auto, cpu or cuda[:N] [auto]
  --debug                 show tracebacks

examples:
  dad-fast predict runs/demo/dad/seed-0 photo.jpg
  dad-fast predict runs/export/model.onnx photos --top 1
  dad-fast predict runs/export photos --json > predictions.jsonl
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(HELP, end="")
        return 0
    options = parse(arguments)
    from dad_fast.tools import predict

    return predict.run(options)


def parse(arguments: Sequence[str]) -> PredictOptions:
    """Raises UsageError."""
    parser = Intermixed("predict")
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("images", nargs="*", default=[])
    parser.add_number("-k", "--top", default=5)
    parser.add_argument("--json", action="store_true", default=False)
    parser.add_number("-b", "--batch-size", default=32)
    parser.add_argument("--device", default="auto")
    given = parser.parse(arguments)
    if not given.model:
        raise UsageError(
            "name a model and images: dad-fast predict MODEL IMAGE ... (see dad-fast predict -h)"
        )
    if not given.images:
        raise UsageError(
            f"name images or a folder of them after {given.model}: dad-fast predict MODEL IMAGE ..."
        )
    return PredictOptions(**{**vars(given), "images": tuple(given.images)})
