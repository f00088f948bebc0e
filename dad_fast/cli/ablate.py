"""`dad-fast ablate`: options and help.

Base settings as for `dad-fast train`, and axes that vary around them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dad_fast.cli.parser import (
    CONFIGS,
    ListAction,
    Parser,
    config_parser,
    read_config,
    typed_options,
)
from dad_fast.cli.screen import fill, option_lines, settings_for, two_columns, wants_help
from dad_fast.config import Config, Launch, to_toml
from dad_fast.config.fields import with_values
from dad_fast.config.options import AblateOptions
from dad_fast.errors import UsageError
from dad_fast.methods.settings import check
from dad_fast.sweep.ablation import AXES, Plan, make_plan, papers_axis

SUMMARY = "vary the settings of a run, one factor at a time: one table, one plot"

HELP = """\
usage: dad-fast ablate [CONFIG.toml ...] [--preset NAME] [--axes AXIS ...] [settings] -o OUT

Train a base run, given as for dad-fast train, and variations of it, each with several seeds, and
compare each with the base. Cells with the same settings are run once.

examples:
  dad-fast ablate --preset demo --dry-run                               # the plan and its cost
  dad-fast ablate --preset demo --epochs 2 --seeds 2 -o runs/ablation   # the components
  dad-fast ablate --preset demo --axes budget start filter --jobs 2 --stores -o runs/attack
  dad-fast ablate --preset demo --vary loss.temperature=1,2,8 --resume auto -o runs/temperature

axes:
{axes}

flags:
{settings}
{flags}

settings: those of dad-fast train (dad-fast train --help-all)
"""

SETTINGS = {
    "seeds": "seeds of every cell, from --seed on [3]",
    "store.make": "cells share stored images (adversarial) or teacher outputs (targets), made here "
    "first [off]; stored images are not augmented",
    "store.images": "none (decoded from codes), raw, webp or jpeg:Q [raw]",
}
SEEDS = 3


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text())
        return 0
    given = vars(_parser().parse(arguments))
    options = typed_options(AblateOptions, given)
    plan, launch = _read(options, given, debug)
    launch = replace(launch, command=shlex.join(("dad-fast", "ablate", *arguments)))
    if options.print_config:
        print(to_toml(plan.config), end="", flush=True)
        return 0
    from dad_fast.sweep import ablate

    return ablate.run(plan, launch, options.dry_run)


def help_text() -> str:
    axes = "\n".join(two_columns(name, axis.help) for name, axis in AXES.items())
    return fill(HELP, axes=axes, settings=settings_for(SETTINGS), flags=option_lines(AblateOptions))


def _parser() -> Parser:
    # --devices stands for --device.
    parser = config_parser(
        "ablate", AblateOptions, CONFIGS, without=["device"], several=["student.name"]
    )
    for name, axis in AXES.items():
        if axis.flag:
            parser.add_argument(
                axis.flag, dest=_values_of(name), action=ListAction, nargs="+", default=[]
            )
    return parser


def _values_of(axis: str) -> str:
    """Return the name under which the parser keeps the values typed for `axis`."""
    return f"values of {axis}"


def _read(options: AblateOptions, given: dict[str, Any], debug: bool) -> tuple[Plan, Launch]:
    """Return the sweep and how it is run. Raises UsageError."""
    from dad_fast.engine.sizes import with_attack

    # The cells of a budget are shares of the base's.
    cfg = with_attack(read_config(given, given[CONFIGS]))
    if cfg.students:
        raise UsageError(
            "ablate varies around one student: compare students as an axis, "
            f"--vary student.name={','.join(cfg.students)}, or train them by dad-fast train"
        )
    if cfg.seeds == 1 and "seeds" not in given:
        cfg = with_values(cfg, {"seeds": SEEDS})
    values = {name: given[_values_of(name)] for name, axis in AXES.items() if axis.flag}
    nothing_named = not options.axes and not options.vary and not any(values.values())
    axes = [papers_axis(cfg)] if nothing_named else options.axes
    plan = make_plan(cfg, axes, values, options.vary)

    # The base first: its problems are problems of every cell.
    base_variant = {plan.base: plan.config.variants[plan.base]}
    check(with_values(plan.config, {"variants": base_variant, "seeds": 1}))
    check(plan.config)
    if options.resume not in ("", "auto"):
        raise UsageError(
            f"--resume {options.resume}: a sweep resumes with --resume auto, "
            "in the folder of --output"
        )
    launch = Launch(
        output=options.output,
        resume=options.resume,
        debug=debug,
        preset="+".join(given["preset"]),
        jobs=options.jobs,
        devices=_devices(options.devices, cfg),
        share_batches=options.share_batches,
    )
    return plan, launch


def _devices(names: Sequence[str], cfg: Config) -> tuple[str, ...]:
    if not names and cfg.device != "auto":
        names = [cfg.device]
    for name in names:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise UsageError(f"--devices {name}: must be cpu or cuda:N")
    return tuple(dict.fromkeys(names))
