"""`dad-fast precompute`: options and help.

The settings of `dad-fast train` that a store depends on, and its form.
"""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import CONFIGS, config_parser, read_config, typed_options
from dad_fast.cli.screen import fill, option_lines, setting_lines, wants_help
from dad_fast.config import Config
from dad_fast.config.options import StoreLaunch
from dad_fast.errors import UsageError

SUMMARY = "fill a store: adversarial images, or the teacher's outputs, once for many runs"

HELP = """\
usage: dad-fast precompute [CONFIG.toml ...] [--preset NAME] [flags] [--set KEY=VALUE ...] -o STORE

Attack and discretize a data set once, or (--targets) store the teacher's outputs on augmented
views of it, so that dad-fast train --store STORE needs neither. An interrupted command resumes.

examples:
  dad-fast precompute --preset demo -o runs/store --images raw
  dad-fast train --preset demo --method dad --store runs/store -o runs/stored
  dad-fast precompute --preset dad-vitb16 --data-dir DIR --teacher NAME --discretizer FILE \\
      -o STORE --estimate
  RANK=0 WORLD_SIZE=2 dad-fast precompute ... -o PART0    # one of two machines, no shared disk
  dad-fast store merge PART0 PART1 -o STORE               # then the parts together

the store:
{flags}

settings, those of dad-fast train (dad-fast train --help-all lists every one), such as:
{settings}
"""

SETTINGS = (
    "data.data_dir",
    "data.batch_size",
    "teacher.name",
    "discretizer.name",
    "augment.img_size",
    "precision.amp",
    "device",
)


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(fill(HELP, flags=option_lines(StoreLaunch), settings=setting_lines(SETTINGS)))
        return 0
    cfg, launch = parse(arguments)
    from dad_fast.engine.preflight import check_files_to_fill
    from dad_fast.engine.sizes import with_numbers

    check_files_to_fill(cfg, discretizer=not launch.targets)
    cfg = with_numbers(cfg)
    from dad_fast.precompute import run as precompute

    return precompute.run(cfg, launch, arguments)


def parse(arguments: Sequence[str]) -> tuple[Config, StoreLaunch]:
    """Return the settings, not checked for completeness, and the options. Raises UsageError."""
    if any(token.partition("=")[0] == "--merge" for token in arguments):
        raise UsageError(
            "--merge: parts are merged by their own command: "
            "dad-fast store merge PART [PART ...] -o STORE"
        )
    given = vars(config_parser("precompute", StoreLaunch, CONFIGS).parse(arguments))
    cfg = read_config(given, given[CONFIGS], one_student="precompute")
    launch = typed_options(StoreLaunch, given)
    if not launch.output:
        raise UsageError("name the store's folder: -o STORE")
    if not cfg.data.data_dir:
        raise UsageError("a store needs data: add --data-dir")
    if not cfg.teacher.name:
        raise UsageError("a store needs a teacher: add --teacher")
    if not launch.targets and not cfg.discretizer.name:
        raise UsageError(
            "a store of adversarial images needs a discretizer: add --discretizer "
            "(a VQGAN's file, identity or jpeg:75)"
        )
    return cfg, launch
