"""Flags of `dad-fast doctor`."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import Parser, wants_help
from dad_fast.config.options import DoctorOptions
from dad_fast.errors import UsageError

SUMMARY = "look at this machine (packages, GPU, kernels, numerics), or with --data at a data set"

HELP = """\
usage: dad-fast doctor [--numerics]
       dad-fast doctor --data DIR [--split NAME] [--class-map FILE] [--loader NAME] [--need N]

Says of every part what is on, what is off, why, and the mend. Exit code 0, or 3 when something
that is required is missing or broken. With --data it looks at a data set instead: classes, bad
files, formats, sizes, and how fast each back end decodes it here. Exit code 0, or 4 when the data
cannot be trained on.

  --numerics        also check the arithmetic here: codebook search against float64, the attack
                    against its closed form on a linear teacher

  --data DIR        image folder, folder or pattern of WebDataset shards, or embedded:digits
  --split NAME      sub-folder or pattern in it [train where there is one]
  --class-map FILE  CSV (id, folder, name) with the classes
  --loader NAME     which back ends decode: auto (every one here), dali or pil [auto]
  --need N          images a second that training will take [estimates for one H200]
  --debug           show tracebacks

examples:
  dad-fast doctor --data /data/imagenet
  dad-fast doctor --data '/data/in1k/train-{000000..000099}.tar' --need 4000
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(HELP, end="")
        return 0
    options = parse(arguments)
    if options.data:
        from dad_fast.tools.doctor import data as doctor_data

        return doctor_data.run(options)
    from dad_fast.tools.doctor import run as doctor

    return doctor.run(options.numerics)


def parse(arguments: Sequence[str]) -> DoctorOptions:
    parser = Parser("doctor")
    parser.add_argument("--numerics", action="store_true", default=False)
    parser.add_argument("--data", default="")
    parser.add_argument("--split", default=None)
    parser.add_argument("--class-map", dest="class_map", default="")
    parser.add_argument("--loader", choices=("auto", "dali", "pil", "torchvision"), default="auto")
    parser.add_argument("--need", type=float, default=0.0)
    options = DoctorOptions(**vars(parser.parse(arguments)))
    if options.data and options.numerics:
        raise UsageError("--data looks at a data set and --numerics at this machine: leave one out")
    if not options.data and (options.split, options.class_map, options.loader, options.need) != (
        None,
        "",
        "auto",
        0.0,
    ):
        raise UsageError("--split, --class-map, --loader and --need go with --data DIR")
    if not 0 <= options.need < float("inf"):
        raise UsageError(f"--need {options.need:g}: must be a number of images a second")
    return options
