"""Flags of `dad-fast ablate`: the settings of `dad-fast train` as the base, what varies around it, and how the sweep is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dad_fast.config import Config, to_toml
from dad_fast.config.ablation import AXES, Plan, make_plan, papers_axis
from dad_fast.config.ablation_stores import KINDS, with_stores
from dad_fast.config.fields import nearest, with_values
from dad_fast.errors import UsageError
from dad_fast.flags import ListAction, Parser, config_parser, read_config, two_columns, wants_help

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
    "--devices D ...": "one process each: cuda:0 cuda:1, or cpu [every GPU, else cpu]",
    "--jobs N": "number of processes, dealt over the devices [one a device]",
    "--stores [KIND ...]": "cells share stored images (adversarial) or the teacher's outputs (targets) "
    "[off]. Stored images are not augmented: it is another form of training",
    "--store-views N": "draws per stored image [1; targets: one an epoch]",
    "--store-images FORM": "none (decoded from codes), raw, webp or jpeg:Q [raw]",
    "--dry-run": "print the plan and its cost, from a few steps of each form",
    "--print-config": "print the sweep as TOML, every cell a variant, and exit",
    "--debug": "show tracebacks",
}
SEEDS = 3
TYPED = tuple(axis.flag for axis in AXES.values() if axis.flag)


@dataclass(frozen=True, kw_only=True)
class SweepLaunch:
    output: str
    resume: bool
    devices: tuple[str, ...]  # empty = to be found out
    jobs: int  # 0 = one a device
    stores: tuple[str, ...]  # kinds
    store_views: int
    store_images: str
    dry_run: bool
    preset: str


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text())
        return 0
    given = _parser().parse(arguments)
    plan, launch = _read(vars(given))
    if given.print_config:
        print(to_toml(plan.config), end="", flush=True)
        return 0
    from dad_fast.commands import ablate

    return ablate.run(plan, launch)


def help_text() -> str:
    lines = [INTRO.rstrip(), "", "axes:", *(two_columns(name, axis.help) for name, axis in AXES.items())]
    lines += ["", "flags:", *(two_columns(*pair) for pair in FLAGS.items())]
    lines += ["", "settings: those of dad-fast train (dad-fast train --help-all)"]
    return "\n".join(lines)


def _parser() -> Parser:
    parser = config_parser("ablate", "config", without=["device"])  # --devices
    parser.add_argument("-o", "--output", default="runs/ablation")
    parser.add_argument("--resume", default="")
    parser.add_number("--jobs", default=0)
    parser.add_number("--store-views", default=0)
    parser.add_argument("--store-images", default="raw")
    for flag in ("--axes", "--devices", *TYPED):
        parser.add_argument(flag, action=ListAction, nargs="+", dest=_name(flag), default=[])
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--stores", nargs="*", default=None)
    for flag in ("--dry-run", "--print-config"):
        parser.add_argument(flag, action="store_true", default=False)
    return parser


def _read(given: dict[str, Any]) -> tuple[Plan, SweepLaunch]:
    """The sweep and how it is run. Raises UsageError."""
    cfg = read_config(given, given["config"])
    if cfg.seeds == 1 and "seeds" not in given:
        cfg = with_values(cfg, {"seeds": SEEDS})
    launch = SweepLaunch(
        output=given["output"],
        resume=_resume(given["resume"]),
        devices=_devices(given["devices"], cfg),
        jobs=given["jobs"],
        stores=_kinds(given["stores"]),
        store_views=given["store_views"],
        store_images=_images(given["store_images"]),
        dry_run=given["dry_run"],
        preset=given["preset"],
    )
    values = {name: given[_name(axis.flag)] for name, axis in AXES.items() if axis.flag}
    nothing_named = not given["axes"] and not given["vary"] and not any(values.values())
    plan = make_plan(cfg, [papers_axis(cfg)] if nothing_named else given["axes"], values, given["vary"])
    return with_stores(plan, launch.stores, f"{launch.output}/stores", launch.store_views, launch.store_images), launch


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _resume(text: str) -> bool:
    if text not in ("", "auto"):
        raise UsageError(f"--resume {text}: a sweep goes on with --resume auto, in the folder that --output names")
    return bool(text)


def _devices(names: Sequence[str], cfg: Config) -> tuple[str, ...]:
    names = names or ([cfg.device] if cfg.device != "auto" else [])
    for name in names:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise UsageError(f"--devices {name}: must be cpu or cuda:N")
    return tuple(dict.fromkeys(names))


def _images(form: str) -> str:
    quality = form.removeprefix("jpeg:")
    if form not in ("none", "raw", "webp") and not (form != quality and quality.isdecimal() and 1 <= int(quality) <= 100):
        raise UsageError(f"--store-images {form}: must be none, raw, webp or jpeg:Q with a quality from 1 to 100")
    return form


def _kinds(typed: Sequence[str] | None) -> tuple[str, ...]:
    if typed is None:
        return ()
    kinds = [kind for text in typed for kind in text.split(",") if kind]
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"--stores {kind}: no such kind{nearest(kind, KINDS)} (kinds: {', '.join(KINDS)})")
    return tuple(kind for kind in KINDS if kind in kinds) or ("adversarial",)
