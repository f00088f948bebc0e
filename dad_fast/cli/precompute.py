"""Flags of `dad-fast precompute`: the settings of `dad-fast train` that a store depends on, and the form of the store."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import config_parser, entry, read_config, two_columns, wants_help
from dad_fast.config import Config
from dad_fast.config.fields import settings
from dad_fast.config.options import StoreLaunch
from dad_fast.errors import UsageError

SUMMARY = "fill a store: adversarial images, or the teacher's outputs, once for many runs"

INTRO = """\
usage: dad-fast precompute [CONFIG.toml] [--preset NAME] [flags] [--set KEY=VALUE ...] -o STORE

Attacks and discretizes a data set once, or (--targets) stores what the teacher says of augmented
views of it, so that dad-fast train --store STORE needs neither. It goes on where it was stopped.

examples:
  dad-fast precompute --preset demo -o runs/store --images raw
  dad-fast train --preset demo --method dad --store runs/store -o runs/stored
  dad-fast precompute --preset dad-vitb16 --data-dir DIR --teacher NAME --discretizer FILE \\
      -o STORE --estimate
  RANK=0 WORLD_SIZE=2 dad-fast precompute ... -o PART0    one machine of two without a shared disk,
  dad-fast store merge PART0 PART1 -o STORE               then all its parts together
"""

STORE_FLAGS = {
    "-o, --output DIR": "the store's folder; an unfinished store of the same settings is completed",
    "--targets": "store the teacher's outputs on augmented, mixed clean images instead",
    "--views N": "draws per image; training cycles through them [1]",
    "--outputs FORM": "the teacher's outputs: full (16-bit logits) or topk:K [full]",
    "--images FORM": "adversarial images as pixels besides the codes: none, raw, webp, jpeg:Q [none]",
    "--block-size N": "images per block, the unit of work; part of the store's identity [--batch-size]",
    "--shard-blocks N": "blocks per shard, what one process writes at a time [about 1 GB]",
    "--nproc N|auto": "processes on this machine, auto = one a GPU [1]",
    "--estimate": "measure a few blocks and say what the whole would take; writes nothing",
    "--check SHARE": "recompute this share of the blocks of an existing store and compare",
    "--debug": "show tracebacks",
}
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
        print(help_text())
        return 0
    cfg, launch = parse(arguments)
    from dad_fast.precompute import run as precompute

    return precompute.run(cfg, launch, arguments)


def help_text() -> str:
    lines = [
        INTRO.rstrip(),
        "",
        "the store:",
        *(two_columns(*pair) for pair in STORE_FLAGS.items()),
    ]
    lines += [
        "",
        "settings, those of dad-fast train (dad-fast train --help-all lists every one), such as:",
    ]
    lines += [entry(settings()[path]) for path in SETTINGS]
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> tuple[Config, StoreLaunch]:
    """The settings, not checked for completeness, and the store's form. Raises UsageError."""
    parser = config_parser("precompute", "config")
    parser.add_argument("-o", "--output", default="")
    parser.add_argument("--targets", action="store_true", default=False)
    parser.add_argument("--estimate", action="store_true", default=False)
    parser.add_argument("--outputs", default="full")
    parser.add_argument("--images", default="none")
    for flag, default in (("--views", 1), ("--block-size", 0), ("--shard-blocks", 0)):
        parser.add_number(flag, default=default)
    parser.add_nproc()
    parser.add_argument("--check", default=0.0, type=_share)
    if any(token.partition("=")[0] == "--merge" for token in arguments):
        raise UsageError(
            "--merge: parts are brought together by a verb of their own: dad-fast store merge PART [PART ...] -o STORE"
        )
    given = vars(parser.parse(arguments))
    cfg = read_config(given, given["config"])
    names = (
        "output",
        "targets",
        "views",
        "outputs",
        "images",
        "block_size",
        "shard_blocks",
        "nproc",
        "estimate",
        "check",
    )
    launch = StoreLaunch(**{name: given[name] for name in names})
    if not launch.output:
        raise UsageError("name the store's folder: -o STORE")
    if not cfg.data.data_dir or not cfg.teacher.name:
        raise UsageError(
            f"a store needs {'data: add --data-dir' if not cfg.data.data_dir else 'a teacher: add --teacher'}"
        )
    if not launch.targets and not cfg.discretizer.name:
        raise UsageError(
            "a store of adversarial images needs a discretizer: add --discretizer (a VQGAN's file, identity or jpeg:75)"
        )
    return cfg, launch


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise UsageError(f"--check {text}: a share above 0 and up to 1, such as 0.01 or 1%")
    return value
