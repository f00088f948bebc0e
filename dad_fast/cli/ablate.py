"""Flags of `dad-fast ablate`: the settings of `dad-fast train` as the base, what varies around it, and how the sweep is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dad_fast.cli.parser import (
    ListAction,
    Parser,
    config_parser,
    read_config,
    two_columns,
    wants_help,
)
from dad_fast.config import Config, Launch, to_toml
from dad_fast.config.fields import with_values
from dad_fast.errors import UsageError
from dad_fast.methods.settings import check
from dad_fast.sweep.ablation import AXES, Plan, make_plan, papers_axis

SUMMARY = "vary what a run is made of, one factor at a time: one table, one plot"

INTRO = """\
usage: dad-fast ablate [CONFIG.toml] [--preset NAME] [--axes AXIS ...] [settings] -o OUT

Trains a base run, given as for dad-fast train, and variations of it, each with several seeds, and
compares every one with the base. Cells that compute the same are run once.

examples:
  dad-fast ablate --preset demo --dry-run                               # the plan and its cost
  dad-fast ablate --preset demo --epochs 2 --seeds 2 -o runs/ablation   # the components
  dad-fast ablate --preset demo --axes budget start filter --jobs 2 --stores -o runs/attack
  dad-fast ablate --preset demo --vary loss.temperature=1,2,8 --resume auto -o runs/temperature
"""

FLAGS = {
    "--axes AXIS ...": "what varies [components, or lp-clip, where nothing else does]",
    "--vary KEY=V1,V2": "any setting as an axis, such as student.bn=split,aux; repeatable",
    "--seeds N": "seeds of every cell, from --seed on [3]",
    "-o, --output DIR": "the sweep's folder: CELL/seed-S/, table.md, plot.svg [runs/ablation]",
    "--resume auto": "go on with the sweep in --output; cells may be added, the base is the same",
    "--devices D ...": "where runs train: cuda:0 cuda:1, or cpu [every GPU, else cpu]",
    "--jobs N|auto": "runs side by side, dealt over the devices [one a GPU; on a CPU two a core]",
    "--stores [KIND ...]": "cells share stored images (adversarial) or teacher outputs (targets), made here first "
    "[off]. Stored images are not augmented: it is another form of training",
    "--store-images FORM": "none (decoded from codes), raw, webp or jpeg:Q [raw]",
    "--dry-run": "print the plan and its cost, from a few steps of each form",
    "--print-config": "print the sweep as TOML, every cell a variant, and exit",
    "--debug": "show tracebacks",
}
SEEDS = 3
TYPED = tuple(axis.flag for axis in AXES.values() if axis.flag)


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text())
        return 0
    given = _parser().parse(arguments)
    plan, launch = _read(vars(given), debug)
    if given.print_config:
        print(to_toml(plan.config), end="", flush=True)
        return 0
    from dad_fast.sweep import ablate

    return ablate.run(plan, launch, given.dry_run)


def help_text() -> str:
    lines = [
        INTRO.rstrip(),
        "",
        "axes:",
        *(two_columns(name, axis.help) for name, axis in AXES.items()),
    ]
    lines += ["", "flags:", *(two_columns(*pair) for pair in FLAGS.items())]
    lines += ["", "settings: those of dad-fast train (dad-fast train --help-all)"]
    return "\n".join(lines)


def _parser() -> Parser:
    parser = config_parser("ablate", "config", without=["device"])  # --devices
    parser.add_argument("-o", "--output", default="runs/ablation")
    parser.add_argument("--resume", default="")
    parser.add_jobs()
    for flag in ("--axes", "--devices", *TYPED):
        parser.add_argument(flag, action=ListAction, nargs="+", dest=_name(flag), default=[])
    parser.add_argument("--vary", action="append", default=[])
    for flag in ("--dry-run", "--print-config"):
        parser.add_argument(flag, action="store_true", default=False)
    return parser


def _read(given: dict[str, Any], debug: bool) -> tuple[Plan, Launch]:
    """The sweep and how it is run. Raises UsageError."""
    cfg = read_config(given, given["config"])
    if cfg.seeds == 1 and "seeds" not in given:
        cfg = with_values(cfg, {"seeds": SEEDS})
    values = {name: given[_name(axis.flag)] for name, axis in AXES.items() if axis.flag}
    nothing_named = not given["axes"] and not given["vary"] and not any(values.values())
    plan = make_plan(
        cfg, [papers_axis(cfg)] if nothing_named else given["axes"], values, given["vary"]
    )
    base = with_values(
        plan.config, {"variants": {plan.base: plan.config.variants[plan.base]}, "seeds": 1}
    )
    check(base)  # first: what is wrong with it is wrong with every cell
    check(plan.config)
    launch = Launch(
        output=given["output"],
        resume=_resume(given["resume"]),
        debug=debug,
        preset=given["preset"],
        jobs=given["jobs"],
        devices=_devices(given["devices"], cfg),
    )
    return plan, launch


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _resume(text: str) -> str:
    if text not in ("", "auto"):
        raise UsageError(
            f"--resume {text}: a sweep resumes with --resume auto, in the folder that --output names"
        )
    return text


def _devices(names: Sequence[str], cfg: Config) -> tuple[str, ...]:
    names = names or ([cfg.device] if cfg.device != "auto" else [])
    for name in names:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise UsageError(f"--devices {name}: must be cpu or cuda:N")
    return tuple(dict.fromkeys(names))
