"""Flags of `dad-fast analyze`: a run or settings that name teacher and discretizer, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dad_fast.cli.parser import config_parser, entry, read_config, two_columns, wants_help
from dad_fast.config import Config
from dad_fast.config.fields import nearest, settings
from dad_fast.config.options import AnalyzeLaunch
from dad_fast.errors import UsageError

SUMMARY = "measure how far clean, discretized and attacked images lie from test sets"

INTRO = """\
usage: dad-fast analyze [RUN|CONFIG.toml] [--preset NAME] [flags] [--suite NAME ...] [-o OUT]

How far the training images, Q(clean), random + Q, DAT's and DAD's images lie from each test set in
a feature space: sliced Wasserstein-2 distance and MMD with 95 % intervals, diversity,
share of codes changed, classes that move, picture sheets. RUN is a run's folder: its settings are
used, and DAT attacks its student. Writes OUT/analysis.json, analysis.md and sheet-*.png.

examples:
  dad-fast analyze runs/demo/dad/seed-0 --suite test optdigits contrast:5      # after the demo
  dad-fast analyze --preset demo --init-from runs/demo/dad/seed-0 -o runs/analysis
  dad-fast analyze --preset dad-vitb16 --data-dir DIR --teacher NAME --discretizer FILE \\
      --suite /data/imagenet-r /data/sketch -o runs/analysis                   # no student: no DAT
"""

FLAGS = {
    "-o, --output DIR": "where to write; an earlier analysis there is replaced [RUN/analysis]",
    "--features SPACE": "where: teacher, student (what its classifier sees), or pixels [teacher]",
    "--num-images N": "images of the training set, and of each test set [1000]",
    "--projections N": "directions of the sliced Wasserstein distance [256]",
    "--resamples N": "random halves that the intervals are made from [200]",
    "--debug": "show tracebacks",
}
SETTINGS = (
    *(
        "data.data_dir",
        "eval.suites",
        "teacher.name",
        "discretizer.name",
        "student.init_from",
        "loss.filter",
    ),
    *("attack.eps", "attack.steps", "augment.img_size", "precision.amp", "device", "seed"),
)
SPACES = ("teacher", "student", "pixels")
LEAST = {"--num-images": 20, "--projections": 1, "--resamples": 20}


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text())
        return 0
    cfg, launch = parse(arguments)
    from dad_fast.tools.analyze import run as analyze

    return analyze.run(cfg, launch)


def help_text() -> str:
    lines = [INTRO.rstrip(), "", "flags:", *(two_columns(*pair) for pair in FLAGS.items())]
    lines += [
        "",
        "settings, those of dad-fast train (dad-fast train --help-all lists every one), such as:",
    ]
    return "\n".join([*lines, *(entry(settings()[path]) for path in SETTINGS)])


def parse(arguments: Sequence[str]) -> tuple[Config, AnalyzeLaunch]:
    """The settings, not checked for completeness, and what is measured. Raises UsageError."""
    parser = config_parser("analyze", "run")
    parser.add_argument("-o", "--output", default="")
    parser.add_argument("--features", default=AnalyzeLaunch.features)
    for flag, least in LEAST.items():
        parser.add_number(
            flag, default=getattr(AnalyzeLaunch, flag[2:].replace("-", "_")), least=least
        )
    given = vars(parser.parse(arguments))
    folder, file = _run_and_file(given["run"])
    cfg = read_config(given, file)
    if folder and cfg.variants:
        inside = next(iter(sorted(folder.glob("*/seed-*"))), folder / "VARIANT" / "seed-0")
        raise UsageError(f"{folder} holds several runs; name one of them, such as {inside}")
    if given["features"] not in SPACES:
        raise UsageError(
            f"--features {given['features']}: no such space{nearest(given['features'], SPACES)} (known: {', '.join(SPACES)})"
        )
    output = given["output"] or (str(folder / "analysis") if folder else "")
    if not output:
        raise UsageError("name the folder to write to: -o OUT")
    if not cfg.data.data_dir:
        raise UsageError(
            "no data: name a run's folder, or add --data-dir (a folder with train/ and val/, or embedded:digits)"
        )
    for part, name in (("teacher", cfg.teacher.name), ("discretizer", cfg.discretizer.name)):
        if not name:
            raise UsageError(f"nothing names a {part}: add --{part}")
    numbers = {name: given[name] for name in ("features", "num_images", "projections", "resamples")}
    return cfg, AnalyzeLaunch(output=output, weights=str(folder or ""), **numbers)


def _run_and_file(name: str) -> tuple[Path | None, Path | None]:
    """A run's folder and its settings, or a file of settings alone."""
    if not name:
        return None, None
    path = Path(name)
    if not path.is_dir():
        return None, path
    if not (path / "config.toml").is_file():
        raise UsageError(
            f"{path}: no run (there is no config.toml in it); name a run's folder, or settings with --preset"
        )
    return path, path / "config.toml"
