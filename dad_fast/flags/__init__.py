"""Command-line flags made from the schema's metadata, and the help texts that list them."""

from __future__ import annotations

import argparse
import textwrap
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from dad_fast.config.fields import OTHER_NAMES, Setting, nearest, sections, settings
from dad_fast.config.resolve import preset_names
from dad_fast.errors import UsageError

WIDTH = 100

TRAIN_INTRO = """\
usage: dad-fast train [CONFIG.toml] [--preset NAME] [flags] [--set section.key=value ...] [-o OUT]

examples:
  dad-fast train --preset demo                                             # on embedded data
  dad-fast train --preset demo --method dad --max-steps 20 -o runs/try     # a first look
  dad-fast train --preset dad-vitb16 --data-dir DIR --discretizer vqgan.ckpt \\
      --teacher open_clip:ViT-L-14@vitl14.safetensors -o runs/dad                   # ImageNet
"""

TRAIN_OUTRO = """\
presets: {presets}
Later wins: defaults < preset < CONFIG.toml < --set < flags.   Every flag and key: --help-all
"""

EVAL_INTRO = """\
usage: dad-fast eval [CKPT] [--data-dir DIR] [--suite NAME ...] [--teacher NAME] [--json FILE]

CKPT is a run's folder, a checkpoint's folder or a .safetensors file. A run's folder knows its data.

examples:
  dad-fast eval runs/demo/dad/seed-0 --suite test optdigits gaussian_noise     # after the demo
  dad-fast eval --teacher embedded:digits --data-dir embedded:digits --suite optdigits
  dad-fast eval model.safetensors --data-dir /data/imagenet --suite val /data/sketch --json out.json
"""

EVAL_SETTINGS = (
    *("data.data_dir", "eval.suites", "teacher.name", "data.batch_size", "data.workers", "device", "data.class_map", "data.val_split"),
    *("augment.img_size", "augment.crop_pct", "augment.interpolation", "teacher.head", "teacher.templates"),
)
EVAL_TEXTS = {
    "data.data_dir": "image folder, WebDataset shards or embedded:digits; empty = the run's own",
    "eval.suites": "splits of the data, image folders, or corruptions as NAME or NAME:SEVERITY; empty = the run's own, or --val-split",
    "teacher.name": "judge this teacher too; without CKPT, only the teacher",
    "data.batch_size": "images per batch",
    "data.val_split": "what corruptions are applied to when --suite names no split",
    "augment.img_size": "side of the square images; 0 = the model's own",
    "augment.crop_pct": "share of the resized image kept; 0 = the model's own",
    "augment.interpolation": "resampling filter; empty = the model's own",
}


class Parser(argparse.ArgumentParser):
    """No abbreviations; every mistake is a UsageError, an unknown flag with the nearest match."""

    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"dad-fast {verb}", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.verb = verb

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')} (see dad-fast {self.verb} -h)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        known = self._option_string_actions
        for token in arguments:
            flag = token.partition("=")[0]
            is_flag = token.startswith("--") or (token.startswith("-") and token[1:2].isalpha())
            if not is_flag or flag in known or (not token.startswith("--") and token[:2] in known):
                continue
            hint = f"; did you mean {OTHER_NAMES[flag]}?" if flag in OTHER_NAMES else nearest("--" + flag.lstrip("-"), known)
            raise UsageError(f"unknown flag {flag}{hint or f'; dad-fast {self.verb} --help-all lists every flag'}")
        return self.parse_args(arguments)


class _List(argparse.Action):
    """`--suite a b`, `--suite a,b` and `--suite a --suite b` are the same list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        items = [item for value in values for item in value.split(",") if item]
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *items])


def add_settings(parser: argparse.ArgumentParser, paths: Iterable[str]) -> None:
    """Flags for the settings at `paths` that have one. What is typed stays text: `resolve` gives it its type."""
    for path in paths:
        setting = settings()[path]
        if not setting.flag:
            continue
        names = [name for name in (setting.short, setting.flag) if name]
        if setting.type is bool:
            parser.add_argument(*names, dest=path, action=argparse.BooleanOptionalAction)
        elif typing.get_origin(setting.type) is tuple:
            parser.add_argument(*names, dest=path, action=_List, nargs="+")
        else:
            parser.add_argument(*names, dest=path)


LAUNCH_FLAGS = {
    "CONFIG.toml": "settings; keys that it leaves out come from the preset or the defaults",
    "--preset NAME": "a named set of settings",
    "--set KEY=VALUE": "any setting by its key, such as --set optim.opt_kwargs.eps=1e-6; repeatable",
    "-o, --output DIR": "the run's folder; by default runs/ and the name of the preset, CONFIG or method",
    "--resume auto|PATH": "continue the run in --output, or from a checkpoint; auto starts when there is none",
    "--overwrite": "replace an existing run",
    "--allow-config-change": "resume although settings that change the result differ",
    "--print-config": "print the resolved settings as TOML and exit",
    "--debug": "show tracebacks",
}


def train_parser() -> Parser:
    parser = Parser("train")
    parser.add_argument("config", nargs="?", default="")
    parser.add_argument("--preset", default="")
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("-o", "--output", default="")
    parser.add_argument("--resume", default="")
    for flag in ("--overwrite", "--allow-config-change", "--print-config"):
        parser.add_argument(flag, action="store_true", default=False)
    add_settings(parser, settings())
    return parser


def eval_parser() -> Parser:
    parser = Parser("eval")
    parser.add_argument("checkpoint", nargs="?", default="")
    parser.add_argument("--json", default="")
    add_settings(parser, EVAL_SETTINGS)
    return parser


def train_help(every: bool) -> str:
    """The screen of `dad-fast train -h`, or with `every` all flags and keys by section."""
    lines = [TRAIN_INTRO.rstrip(), "", "settings:"] if not every else ["dad-fast train: every setting, its flag, meaning and [default]", ""]
    if every:
        for section in ("", *sections()):
            lines.append(f"[{section}]" if section else "general")
            lines += [entry(s, key=True) for path, s in settings().items() if path.rpartition(".")[0] == section]
            lines.append("")
    else:
        lines += [entry(s) for s in settings().values() if s.main]
    lines += ["", "the run:"] if not every else ["the run"]
    lines += [two_columns(names, text) for names, text in LAUNCH_FLAGS.items()]
    lines += ["", TRAIN_OUTRO.format(presets=", ".join(preset_names())).rstrip()]
    return "\n".join(lines)


def eval_help() -> str:
    table = settings()
    lines = [EVAL_INTRO.rstrip(), "", "flags:"]
    lines += [two_columns(_names(table[path]), EVAL_TEXTS.get(path, table[path].help)) for path in EVAL_SETTINGS]
    lines.append(two_columns("--json FILE", "write the results there too; an existing .json is replaced"))
    lines.append(two_columns("--debug", "show tracebacks"))
    return "\n".join(lines)


def entry(setting: Setting, key: bool = False) -> str:
    names = _names(setting) if setting.flag else f"--set {setting.path}=..."
    default = setting.default if setting.default not in ("", (), {}) else ""
    default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower() if default in (True, False) else default
    text = setting.help + (f" [{default}]" if str(default) else "")
    return two_columns(names, text + (f" ({setting.path})" if key and setting.flag else ""))


def _names(setting: Setting) -> str:
    flag = f"--[no-]{setting.flag[2:]}" if setting.type is bool else setting.flag
    return f"{setting.short + ', ' if setting.short else ''}{flag}{_metavar(setting)}"


def _metavar(setting: Setting) -> str:
    if setting.type is bool:
        return ""
    if setting.choices:
        text = "|".join(setting.choices)
        return " " + (text if len(text) < 24 else "NAME")
    if typing.get_origin(setting.type) is tuple:
        return " A B" if len(setting.default) == 2 else " NAME ..."
    files = {
        "data.data_dir": "DIR",
        "data.class_map": "FILE",
        "teacher.head": "FILE",
        "student.weights": "FILE",
        "student.init_from": "PATH",
    }
    return " " + {int: "N", float: "X"}.get(setting.type, files.get(setting.path, "NAME"))


def two_columns(left: str, right: str) -> str:
    indent = 28
    if len(left) + 4 > indent:
        return f"  {left}\n" + textwrap.fill(right, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
    return textwrap.fill(right, WIDTH, initial_indent=f"  {left:<{indent - 2}}", subsequent_indent=" " * indent)
