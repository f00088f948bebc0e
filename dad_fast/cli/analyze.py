"""`dad-fast analyze`: options and help. Takes a run, or settings with a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dad_fast.cli.parser import config_parser, read_config, typed_options
from dad_fast.cli.screen import fill, option_lines, setting_lines, wants_help
from dad_fast.config import Config
from dad_fast.config.options import AnalyzeLaunch
from dad_fast.errors import UsageError

SUMMARY = "measure the distance of clean, discretized and attacked images from test sets"

HELP = """\
usage: dad-fast analyze [RUN|CONFIG.toml] [--preset NAME] [flags] [--suite NAME ...] [-o OUT]

Measure the distance from the training images, Q(clean), random + Q, DAT's and DAD's images to each
test set in a feature space: sliced Wasserstein-2 distance and MMD with 95 % intervals, diversity,
share of codes changed, classes that move, picture sheets. RUN is a run's folder: its settings are
used, and DAT attacks its student. Writes OUT/analysis.json, analysis.md and sheet-*.png.

examples:
  dad-fast analyze runs/demo/dad/seed-0 --suite test optdigits contrast:5      # after the demo
  dad-fast analyze --preset demo --init-from runs/demo/dad/seed-0 -o runs/analysis
  dad-fast analyze --preset dad-vitb16 --data-dir DIR --teacher NAME --discretizer FILE \\
      --suite /data/imagenet-r /data/sketch -o runs/analysis                   # no student: no DAT

flags:
{flags}

settings, those of dad-fast train (dad-fast train --help-all lists every one), such as:
{settings}
"""

SETTINGS = (
    "data.data_dir",
    "eval.suites",
    "teacher.name",
    "discretizer.name",
    "student.init_from",
    "loss.filter",
    "attack.eps",
    "attack.steps",
    "augment.img_size",
    "precision.amp",
    "device",
    "seed",
)


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text())
        return 0
    cfg, launch = parse(arguments)
    from dad_fast.engine.sizes import with_numbers
    from dad_fast.tools.analyze import run as analyze

    return analyze.run(with_numbers(cfg), launch)


def help_text() -> str:
    return fill(HELP, flags=option_lines(AnalyzeLaunch), settings=setting_lines(SETTINGS))


def parse(arguments: Sequence[str]) -> tuple[Config, AnalyzeLaunch]:
    """Return the settings, not checked for completeness, and the options. Raises UsageError."""
    given = vars(config_parser("analyze", AnalyzeLaunch, "run").parse(arguments))
    folder, file = _run_and_file(given["run"])
    cfg = read_config(given, [file] if file else [], one_student="" if folder else "analyze")
    if folder and (cfg.variants or cfg.students):
        inside = next(iter(sorted(folder.glob("*/seed-*"))), folder / "VARIANT" / "seed-0")
        raise UsageError(f"{folder} holds several runs; name one of them, such as {inside}")
    output = given["output"] or (str(folder / "analysis") if folder else "")
    if not output:
        raise UsageError("name the folder to write to: -o OUT")
    if not cfg.data.data_dir:
        raise UsageError(
            "no data: name a run's folder, or add --data-dir "
            "(a folder with train/ and val/, or embedded:digits)"
        )
    for part, name in (("teacher", cfg.teacher.name), ("discretizer", cfg.discretizer.name)):
        if not name:
            raise UsageError(f"nothing names a {part}: add --{part}")
    return cfg, typed_options(AnalyzeLaunch, given, output=output, weights=str(folder or ""))


def _run_and_file(name: str) -> tuple[Path | None, Path | None]:
    """Return the folder of a run and its settings, or only a file of settings."""
    if not name:
        return None, None
    path = Path(name)
    if not path.is_dir():
        return None, path
    if not (path / "config.toml").is_file():
        raise UsageError(
            f"{path}: no run (there is no config.toml in it); name a run's folder, "
            "or settings with --preset"
        )
    return path, path / "config.toml"
