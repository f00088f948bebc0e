"""`dad-fast eval`: options and help."""

from __future__ import annotations

import argparse

from dad_fast.cli.parser import Parser, add_settings, options_parser, typed_options, typed_settings
from dad_fast.cli.screen import fill, option_lines, settings_for, wants_help
from dad_fast.config.options import EvalLaunch
from dad_fast.errors import UsageError

SUMMARY = "evaluate models on test sets and corruptions, calibrate one, compare two"

HELP = """\
usage: dad-fast eval [MODEL] [--suite NAME ...] [--teacher NAME] [--ood NAME ...] [--json FILE]

MODEL is a run's folder (which knows its data), a checkpoint's folder or a .safetensors file, or
timm:NAME[@FILE], timm:hf-hub:REPO, open_clip:ARCH@FILE, open_clip:ARCH/TAG, hf-hub:REPO, or
several joined by +.

examples:
  dad-fast eval runs/demo/dad/seed-0 --suite test optdigits gaussian_noise     # after the demo
  dad-fast eval runs/demo/dad/seed-0 --teacher embedded:digits --suite optdigits
  dad-fast eval --compare runs/demo/dad/seed-0 runs/demo/kd/seed-0 --suite test optdigits
  dad-fast eval timm:resnet50@r50.safetensors --suite imagenet=/data/val imagenet-a=/data/imagenet-a

names after --suite:
  KIND=DIR      imagenet, imagenet-v2, -a, -r, -sketch, -c, -stylized, objectnet; subset: a part
  SPLIT, DIR    a split or an image folder, of all the model's classes; DIR@FILE.csv maps folders
  contrast:3    a corruption of the first other suite, with one severity, or all if none is given

flags:
{settings}
{flags}
"""

# Settings that evaluation uses, with a help text if they mean something else here.
SETTINGS = {
    "data.data_dir": "image folder, shards or embedded:digits; empty = the run's own",
    "eval.suites": "what to evaluate on; empty = the run's own, or --val-split",
    "teacher.name": "evaluate this teacher too, and MODEL's agreement with it",
    "data.batch_size": "images per batch",
    "data.workers": "loader processes; auto: by the cores; 0: load in this process",
    "device": "",
    "data.class_map": "CSV (id,folder,name): the classes of a published model",
    "data.val_fraction": "share of train that is val, where there is no val split",
    "data.val_split": "the split for corruptions when --suite names no split",
    "augment.img_size": "side of the square images; 0 = the model's own",
    "augment.crop_pct": "share of the resized image kept; 0 = the model's own",
    "augment.interpolation": "resampling filter; empty = the model's own",
    "teacher.head": "safetensors with a fine-tuned linear head; empty = zero-shot",
    "teacher.templates": "",
    "eval.allow_partial": "evaluate incomplete published test sets, marked as such",
    "eval.c_preprocessing": "",
    "data.loader": "dali: plain JPEGs are decoded by DALI (results record it); else PIL",
}
# Accepted, and explained by `dad-fast train --help-all` alone.
OF_TEACHERS = ("teacher.weights", "teacher.average", "teacher.img_size")


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text())
        return 0
    given = vars(make_parser().parse(arguments))
    command_line = (*arguments, "--debug") if debug else tuple(arguments)
    launch = typed_options(EvalLaunch, given, arguments=command_line)
    if launch.compare and launch.model:
        raise UsageError(f"--compare evaluates its two models alone: leave {launch.model} out")
    if launch.like:
        from dad_fast.tools import like

        return like.run(launch, typed_settings(given))
    from dad_fast.tools.evaluate_checks import checked

    job = checked(launch, typed_settings(given))
    # Imports torch.
    from dad_fast.tools import evaluate as command

    return command.run(job)


def make_parser() -> Parser:
    parser = options_parser("eval", EvalLaunch)
    # --model has its own default, which a missing word must not replace.
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS)
    add_settings(parser, (*SETTINGS, *OF_TEACHERS))
    return parser


def help_text() -> str:
    return fill(HELP, settings=settings_for(SETTINGS), flags=option_lines(EvalLaunch))
