"""What the verbs' flags share: a parser, flags made from the schema's metadata, and the help texts that list them.

One module per verb, which imports nothing heavy: `SUMMARY` for the list of verbs, `main(arguments, debug) -> exit code`.
"""

from __future__ import annotations

import argparse
import textwrap
import typing
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dad_fast.config import Config
from dad_fast.config.fields import OTHER_NAMES, Setting, nearest, settings
from dad_fast.config.resolve import gather
from dad_fast.errors import UsageError

WIDTH = 100


class Parser(argparse.ArgumentParser):
    """No abbreviations; every mistake is a UsageError, an unknown flag with the nearest match."""

    def __init__(self, verb: str) -> None:
        super().__init__(
            prog=f"dad-fast {verb}",
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
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
            hint = (
                f"; did you mean {OTHER_NAMES[flag]}?"
                if flag in OTHER_NAMES
                else nearest("--" + flag.lstrip("-"), known)
            )
            raise UsageError(
                f"unknown flag {flag}{hint or f'; dad-fast {self.verb} --help-all lists every flag'}"
            )
        return self.parse_args(arguments)

    def add_number(self, *names: str, default: int, least: int = 1) -> None:
        """A flag whose value is a whole number, `least` or more; `default` may be below, and then says that nothing was typed."""
        self.add_argument(
            *names, default=default, type=partial(whole_number, names[-1], least=least)
        )

    def add_jobs(self) -> None:
        self.add_argument("--jobs", default=0, type=_jobs)

    def add_nproc(self) -> None:
        self.add_argument("--nproc", default="1", type=_nproc)


class Intermixed(Parser):
    """Flags may stand between positional arguments that are optional or many, which argparse alone takes for missing."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


class ListAction(argparse.Action):
    """`--suite a b`, `--suite a,b` and `--suite a --suite b` are the same list."""

    def __call__(
        self,
        parser: Any,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        items = [item for value in values for item in value.split(",") if item] or list(
            self.const or ()
        )
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *items])


def config_parser(verb: str, *positional: str, without: Sequence[str] = ()) -> Parser:
    """The parser of a verb that takes the settings of a run: words that may stand first, --preset, --set, and every setting's flag but
    those of the paths `without`.
    """
    parser = Parser(verb)
    for name in positional:
        parser.add_argument(name, nargs="?", default="")
    parser.add_argument("--preset", default="")
    parser.add_argument("--set", dest="sets", action="append", default=[])
    add_settings(parser, [path for path in settings() if path not in without])
    return parser


def read_config(given: dict[str, Any], file: str | Path | None) -> Config:
    """The settings that a `config_parser` was given, not checked for completeness. Raises UsageError."""
    return gather(
        given["preset"], Path(file) if file else None, given["sets"], typed_settings(given)
    )


def typed_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Path -> what was typed, of the settings that were."""
    return {path: given[path] for path in settings() if path in given}


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
            parser.add_argument(
                *names,
                dest=path,
                action=ListAction,
                nargs="*" if setting.bare else "+",
                const=setting.bare,
            )
        else:
            parser.add_argument(*names, dest=path)


def entry(setting: Setting, key: bool = False) -> str:
    names = flag_names(setting) if setting.flag else f"--set {setting.path}=..."
    default = setting.default if setting.default not in ("", (), {}) else ""
    default = (
        ",".join(map(str, default))
        if isinstance(default, tuple)
        else str(default).lower()
        if default in (True, False)
        else default
    )
    text = setting.help + (f" [{default}]" if str(default) else "")
    return two_columns(names, text + (f" ({setting.path})" if key and setting.flag else ""))


def flag_names(setting: Setting) -> str:
    flag = f"--[no-]{setting.flag[2:]}" if setting.type is bool else setting.flag
    return f"{setting.short + ', ' if setting.short else ''}{flag}{_metavar(setting)}"


def _metavar(setting: Setting) -> str:
    if setting.type is bool:
        return ""
    if setting.choices:
        text = "|".join(setting.choices)
        return " " + (text if len(text) < 24 else "NAME")
    if typing.get_origin(setting.type) is tuple:
        return (
            " A B" if len(setting.default) == 2 else " [KIND ...]" if setting.bare else " NAME ..."
        )
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
        return f"  {left}\n" + textwrap.fill(
            right, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent
        )
    return textwrap.fill(
        right, WIDTH, initial_indent=f"  {left:<{indent - 2}}", subsequent_indent=" " * indent
    )


def wants_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help", "--help-all") for argument in arguments)


def _jobs(text: str) -> int:
    return 0 if text == "auto" else whole_number("--jobs", text, least=1)


def _nproc(text: str) -> str:
    if text == "auto" or (text.isdecimal() and int(text)):
        return text
    raise UsageError(f"--nproc {text}: a whole number, 1 or more, or auto")


def whole_number(flag: str, text: str, least: int) -> int:
    """`text` as typed for `flag`. Raises UsageError."""
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{flag} {text}: a whole number, {least} or more")
    return int(text)
