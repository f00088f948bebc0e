"""Flags of `dad-fast eval`."""

from __future__ import annotations

from dad_fast.cli.parser import (
    ListAction,
    Parser,
    add_settings,
    flag_names,
    two_columns,
    typed_settings,
    wants_help,
)
from dad_fast.config.fields import settings
from dad_fast.config.options import EvalLaunch
from dad_fast.errors import UsageError

SUMMARY = "judge checkpoints and published models on test sets and corruptions, compare two"

INTRO = """\
usage: dad-fast eval [MODEL] [--suite NAME ...] [--teacher NAME] [--ood NAME ...] [--json FILE]
       dad-fast eval --compare A B [--suite NAME ...]

MODEL is a run's folder (which knows its data), a checkpoint's folder or a .safetensors file, or
timm:NAME[@FILE], open_clip:ARCH@FILE, open_clip:ARCH/TAG or hf-hub:REPO; also as --model MODEL.

examples:
  dad-fast eval runs/demo/dad/seed-0 --suite test optdigits gaussian_noise     # after the demo
  dad-fast eval runs/demo/dad/seed-0 --teacher embedded:digits --suite optdigits
  dad-fast eval --compare runs/demo/dad/seed-0 runs/demo/kd/seed-0 --suite test optdigits
  dad-fast eval timm:resnet50@r50.safetensors --suite imagenet=/data/val imagenet-a=/data/imagenet-a
"""

SUITES = """\
names after --suite:
  KIND=DIR      a test set as it is distributed: imagenet, imagenet-v2, imagenet-a, imagenet-r,
                imagenet-sketch, imagenet-c, imagenet-stylized or objectnet; subset=DIR is a folder
                of some of the model's classes, among which alone it may choose
  SPLIT, DIR    a split of the data or an image folder, of all the model's classes; DIR@FILE.csv
                (id,folder,name) says which class each folder is
  contrast:3    a corruption, and its severity if not all, of the first other suite
"""

SETTINGS = (
    *(
        "data.data_dir",
        "eval.suites",
        "teacher.name",
        "data.batch_size",
        "data.workers",
        "device",
        "data.class_map",
        "data.val_split",
    ),
    *(
        "augment.img_size",
        "augment.crop_pct",
        "augment.interpolation",
        "teacher.head",
        "teacher.templates",
    ),
    *("eval.allow_partial", "eval.c_preprocessing", "data.loader"),
)
TEXTS = {
    "data.data_dir": "image folder, shards or embedded:digits; empty = the run's own",
    "eval.suites": "what to judge on; empty = the run's own, or --val-split",
    "teacher.name": "judge this teacher too, and how far MODEL agrees with it",
    "data.batch_size": "images per batch",
    "data.class_map": "CSV (id,folder,name): the classes of a published model",
    "data.val_split": "what corruptions are applied to when --suite names no split",
    "augment.img_size": "side of the square images; 0 = the model's own",
    "augment.crop_pct": "share of the resized image kept; 0 = the model's own",
    "augment.interpolation": "resampling filter; empty = the model's own",
    "data.loader": "dali: plain JPEGs are decoded by DALI, and the results say so; else PIL",
    "teacher.head": "safetensors with a fine-tuned linear head; empty = zero-shot",
    "eval.allow_partial": "judge published test sets that are not whole, and say so",
}
# Flags that are no settings: (names, what to do with them) and their help.
OWN = {
    "--compare A B": "two models, or files of --save-predictions: paired tests",
    "--ood NAME ...": "suites or folders of other classes, to be told from the --id-suite",
    "--id-suite NAME": "the in-distribution suite, for --ood and --baselines; empty = the first",
    "--baselines FILE": "CSV or JSON of baselines' top-1 by suite, for effective robustness",
    "--json, --csv FILE": "write the results there too; an existing .json or .csv is replaced",
    "--save-predictions DIR": "write what each model says of each image, for --compare",
    "--nproc N|auto": "processes on this machine, auto = one a GPU [1]",
    "--debug": "show tracebacks",
}


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text())
        return 0
    given = vars(make_parser().parse(arguments))
    launch = EvalLaunch(
        compare=tuple(given.get("compare", ())),
        ood=tuple(given.get("ood", ())),
        arguments=tuple([*arguments, "--debug"] if debug else arguments),
        **{
            name: given[name]
            for name in ("model", "id_suite", "baselines", "json", "csv", "predictions", "nproc")
            if name in given
        },
    )
    if launch.compare and launch.model:
        raise UsageError(f"--compare judges its two models alone: leave {launch.model} out")
    from dad_fast.tools import evaluate as command

    return command.run(launch, typed_settings(given))


def make_parser() -> Parser:
    parser = Parser("eval")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--compare", nargs=2)
    parser.add_argument("--ood", nargs="+", action=ListAction)
    for flag in ("--id-suite", "--baselines", "--json", "--csv"):
        parser.add_argument(flag)
    parser.add_nproc()
    parser.add_argument("--save-predictions", dest="predictions")
    add_settings(parser, SETTINGS)
    return parser


def help_text() -> str:
    table = settings()
    lines = [INTRO.rstrip(), "", SUITES.rstrip(), "", "flags:"]
    lines += [
        two_columns(flag_names(table[path]), TEXTS.get(path, table[path].help)) for path in SETTINGS
    ]
    lines += [two_columns(*pair) for pair in OWN.items()]
    return "\n".join(lines)
