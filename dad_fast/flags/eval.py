"""Flags of `dad-fast eval`."""

from __future__ import annotations

from dad_fast.config.fields import settings
from dad_fast.flags import Parser, add_settings, flag_names, two_columns, wants_help

SUMMARY = "judge a checkpoint (or a teacher) on test sets and corruptions"

INTRO = """\
usage: dad-fast eval [CKPT] [--data-dir DIR] [--suite NAME ...] [--teacher NAME] [--json FILE]

CKPT is a run's folder, a checkpoint's folder or a .safetensors file. A run's folder knows its data.

examples:
  dad-fast eval runs/demo/dad/seed-0 --suite test optdigits gaussian_noise     # after the demo
  dad-fast eval --teacher embedded:digits --data-dir embedded:digits --suite optdigits
  dad-fast eval model.safetensors --data-dir /data/imagenet --suite val /data/sketch --json out.json
"""

SETTINGS = (
    *("data.data_dir", "eval.suites", "teacher.name", "data.batch_size", "data.workers", "device", "data.class_map", "data.val_split"),
    *("augment.img_size", "augment.crop_pct", "augment.interpolation", "teacher.head", "teacher.templates"),
)
TEXTS = {
    "data.data_dir": "image folder, WebDataset shards or embedded:digits; empty = the run's own",
    "eval.suites": "splits of the data, image folders, or corruptions as NAME or NAME:SEVERITY; empty = the run's own, or --val-split",
    "teacher.name": "judge this teacher too; without CKPT, only the teacher",
    "data.batch_size": "images per batch",
    "data.val_split": "what corruptions are applied to when --suite names no split",
    "augment.img_size": "side of the square images; 0 = the model's own",
    "augment.crop_pct": "share of the resized image kept; 0 = the model's own",
    "augment.interpolation": "resampling filter; empty = the model's own",
}


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text())
        return 0
    given = vars(make_parser().parse(arguments))
    flags = {path: given[path] for path in settings() if path in given}
    from dad_fast.commands import eval as command

    return command.run(given["checkpoint"], flags, given["json"])


def make_parser() -> Parser:
    parser = Parser("eval")
    parser.add_argument("checkpoint", nargs="?", default="")
    parser.add_argument("--json", default="")
    add_settings(parser, SETTINGS)
    return parser


def help_text() -> str:
    table = settings()
    lines = [INTRO.rstrip(), "", "flags:"]
    lines += [two_columns(flag_names(table[path]), TEXTS.get(path, table[path].help)) for path in SETTINGS]
    lines.append(two_columns("--json FILE", "write the results there too; an existing .json is replaced"))
    lines.append(two_columns("--debug", "show tracebacks"))
    return "\n".join(lines)
