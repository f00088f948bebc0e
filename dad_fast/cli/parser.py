"""Argument parsing that the commands share, generated from option classes and the schema.

Each command is a module next to this one, with `SUMMARY` for the list of commands and
`main(arguments, debug)`, which returns the exit code.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dad_fast.config import Config
from dad_fast.config.fields import OTHER_NAMES, nearest, settings
from dad_fast.config.flags import Option, options_of
from dad_fast.config.options import ConfigOptions
from dad_fast.config.resolve import gather
from dad_fast.config.setting import Switch
from dad_fast.errors import UsageError

Options = TypeVar("Options")
# Word of the files with settings.
CONFIGS = "configs"
# Values of a switch on the command line.
SWITCH_WORDS = (*Switch, "true", "false", "yes", "no", "1", "0")


class Parser(argparse.ArgumentParser):
    """Parser of one command: no abbreviations, and every mistake is a UsageError.

    The result contains only those settings that were typed.

    intermixed: flags may stand between words that are optional or many, which argparse alone takes
        for missing.
    """

    def __init__(self, command: str, *, intermixed: bool = False) -> None:
        super().__init__(
            prog=f"dad-fast {command}",
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.command = command
        self.intermixed = intermixed
        # Flags of switches, which mean on without a value, and those that may have a name as value.
        self.switches: set[str] = set()
        self.named_switches: set[str] = set()
        # Flags of several values, after which FILE.toml is a file of settings nevertheless.
        self.before_files: set[str] = set()

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')} (see dad-fast {self.command} -h)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the values by name. Raises UsageError, with a suggestion for an unknown flag."""
        known = self._option_string_actions
        for token in arguments:
            flag = token.partition("=")[0]
            is_flag = token.startswith("--") or (token.startswith("-") and token[1:2].isalpha())
            is_short_with_value = not token.startswith("--") and token[:2] in known
            if not is_flag or flag in known or is_short_with_value:
                continue
            if flag in OTHER_NAMES:
                hint = f"; did you mean {OTHER_NAMES[flag]}?"
            else:
                hint = nearest("--" + flag.lstrip("-"), known)
            every_flag = f"; dad-fast {self.command} --help-all lists every flag"
            raise UsageError(f"unknown flag {flag}{hint or every_flag}")
        parse = self.parse_intermixed_args if self.intermixed else self.parse_args
        return parse(self._with_switch_values(self._files_first(arguments)))

    def _files_first(self, arguments: Sequence[str]) -> list[str]:
        """Move FILE.toml from behind the values of `before_files` to the start."""
        files: list[str] = []
        others: list[str] = []
        flag = ""
        for token in arguments:
            flag = token if token.startswith("-") else flag
            is_file = flag in self.before_files and token.endswith(".toml")
            (files if is_file else others).append(token)
        return [*files, *others]

    def _with_switch_values(self, arguments: Sequence[str]) -> list[str]:
        """Write `--amp` as `--amp=on` where no value follows. argparse would take the next word."""
        following = [*arguments, ""][1:]

        def is_alone(token: str, after: str) -> bool:
            is_value = after.lower() in SWITCH_WORDS
            if token in self.named_switches:
                # Files with settings end in .toml, which no name does.
                is_value = is_value or after.isidentifier()
            return token in self.switches and not is_value

        return [
            f"{token}=on" if is_alone(token, after) else token
            for token, after in zip(arguments, following, strict=True)
        ]


class ListAction(argparse.Action):
    """`--suite a b`, `--suite a,b` and `--suite a --suite b` are the same list."""

    def __call__(
        self,
        parser: Any,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        typed = [item for value in values for item in value.split(",") if item]
        items = typed or list(self.const or ())
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *items])


class LastListAction(ListAction):
    """A list whose last use counts, as for a flag of one value."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *given: Any) -> None:
        setattr(namespace, self.dest, [])
        super().__call__(parser, namespace, *given)


def options_parser(command: str, options: type, *, intermixed: bool = False) -> Parser:
    """Return the parser of a command with the flags and words of the class `options`."""
    parser = Parser(command, intermixed=intermixed)
    add_options(parser, options)
    return parser


def config_parser(
    command: str,
    options: type,
    *words: str,
    without: Sequence[str] = (),
    several: Sequence[str] = (),
) -> Parser:
    """Return the parser of a command that takes the settings of a run.

    Besides `options`: optional `words` without a flag, --preset, --set, and the flag of every
    setting except the paths in `without`. The word CONFIGS is any number of files, between flags
    too. several: paths of settings whose flag takes several values here.
    """
    parser = options_parser(command, options, intermixed=CONFIGS in words)
    for name in words:
        nargs, default = ("*", []) if name == CONFIGS else ("?", "")
        parser.add_argument(name, nargs=nargs, default=default)
    add_options(parser, ConfigOptions)
    add_settings(parser, [path for path in settings() if path not in without], several)
    return parser


def add_options(parser: Parser, options: type) -> None:
    """Add the flags and words of the class `options`."""
    for option in options_of(options):
        is_list = isinstance(option.default, tuple)
        if not option.flag:
            nargs, default = ("*", []) if is_list else ("?", option.default)
            parser.add_argument(option.name, nargs=nargs, default=default)
            continue
        add = partial(parser.add_argument, *option.names, dest=option.name)
        if option.negatable:
            add(action=argparse.BooleanOptionalAction, default=option.default)
        elif not option.metavars:
            add(action="store_true", default=False)
        elif option.repeat:
            add(action="append", default=[])
        elif option.metavars[-1] == "...":
            add(action=ListAction, nargs="+", default=[])
        elif is_list:
            add(nargs=len(option.metavars), default=[])
        else:
            add(type=partial(_read, option), default=option.default)


def _read(option: Option, text: str) -> Any:
    flag = option.names[-1]
    if text == option.default:
        # argparse passes text defaults through here, too.
        return text
    if option.choices and text not in option.choices:
        choices = ", ".join(option.choices)
        hint = nearest(text, option.choices)
        raise UsageError(f"{flag} {text}: must be one of {choices}{hint}")
    return option.read(flag, text) if option.read else text


def typed_options(options: type[Options], given: dict[str, Any], **others: Any) -> Options:
    """Return an instance of the class `options` with its values in `given` and with `others`."""
    values = {option.name: given[option.name] for option in options_of(options)}
    frozen = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return options(**{**frozen, **others})


def read_config(
    given: dict[str, Any], files: Sequence[str | Path], one_student: str = ""
) -> Config:
    """Return the settings given to a `config_parser`, not checked for completeness.

    one_student: the command, if it takes one student. Raises UsageError.
    """
    if {"optim.lr", "optim.lr_base"} <= typed_paths(given):
        raise UsageError("--lr and --lr-base both give the learning rate: leave one out")
    cfg = gather(given["preset"], list(map(Path, files)), given["sets"], typed_settings(given))
    if one_student and cfg.students:
        labels = ", ".join(cfg.students)
        raise UsageError(
            f"{one_student} takes one student, and these settings have {labels}: pick one with "
            "--student NAME"
        )
    return cfg


def typed_paths(given: dict[str, Any]) -> set[str]:
    """Return the keys of the settings that were typed, as flags or after --set."""
    return {*typed_settings(given), *(item.partition("=")[0].strip() for item in given["sets"])}


def typed_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were typed, path -> text."""
    return {path: given[path] for path in settings() if path in given}


def add_settings(parser: Parser, paths: Iterable[str], several: Sequence[str] = ()) -> None:
    """Add the flags of the settings at `paths`. Typed values stay text: `resolve` converts them.

    several: paths whose flag takes several values of one.
    """
    for path in paths:
        setting = settings()[path]
        if not setting.flag:
            continue
        names = [name for name in (setting.short, setting.flag) if name]
        if setting.type is bool:
            parser.add_argument(*names, dest=path, action=argparse.BooleanOptionalAction)
        elif path in several:
            parser.add_argument(*names, dest=path, action=LastListAction, nargs="+")
            parser.before_files.add(setting.flag)
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
            if setting.is_switch:
                parser.switches.update(names)
            if setting.takes_name:
                parser.named_switches.update(names)
