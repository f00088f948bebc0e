"""Command-line flags as fields of a dataclass: declaration, and readers of the typed text."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dad_fast.errors import UsageError

NPROC = "processes on this machine; auto = one per GPU"

# Begins the flag of a switch that can be turned off.
NEGATABLE = "--[no-]"

# Turns the text typed after a flag into a value: (flag, text) -> value. Raises UsageError.
Reader = Callable[[str, str], Any]


class Option(NamedTuple):
    """One field of an option class, and its form on the command line.

    flag: as the help screen shows it, "-o, --output DIR" or "--[no-]check"; empty for a word
        without a flag.
    choices: the only values allowed.
    repeat: each use of the flag adds one value, which is not split at commas.
    """

    name: str
    type: Any
    default: Any
    flag: str
    help: str
    choices: tuple[str, ...]
    read: Reader | None
    repeat: bool

    @property
    def names(self) -> list[str]:
        words = self.flag.replace(NEGATABLE, "--").split()
        return [part.rstrip(",") for part in words if part.startswith("-")]

    @property
    def negatable(self) -> bool:
        """True for a switch that --no-NAME turns off."""
        return NEGATABLE in self.flag

    @property
    def metavars(self) -> list[str]:
        """Placeholders of the values; empty for a switch.

        The last one is "..." for any number of values.
        """
        return [part for part in self.flag.split() if not part.startswith("-")]


def option(
    default: Any,
    flag: str,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    read: Reader | None = None,
    repeat: bool = False,
) -> Any:
    """Field with its `flag`, such as "-o, --output DIR", and its help `text`.

    The help screen adds the default in brackets if it is not empty and `text` does not contain one.
    """
    metadata = {"flag": flag, "help": text, "choices": choices, "read": read, "repeat": repeat}
    return dataclasses.field(default=default, metadata=metadata)


def word(default: Any = "") -> Any:
    """Field for words without a flag: one, or any number if `default` is a tuple.

    The top of the help screen explains them.
    """
    return option(default, "", "")


def options_of(cls: type) -> Iterator[Option]:
    """Yield the options of the dataclass `cls` in the order of its fields."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata:
            yield Option(field.name, hints[field.name], field.default, **field.metadata)


def whole_number(flag: str, text: str, least: int = 1) -> int:
    """Read an integer of at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{flag} {text}: a whole number, {least} or more")
    return int(text)


def at_least(least: int) -> Reader:
    """Return a reader of integers of at least `least`."""
    return lambda flag, text: whole_number(flag, text, least)


def jobs_or_auto(flag: str, text: str) -> int:
    """Read an integer of at least 1, or "auto" as 0."""
    return 0 if text == "auto" else whole_number(flag, text)


def processes_or_auto(flag: str, text: str) -> str:
    """Read "auto" or an integer of at least 1, kept as text."""
    if text == "auto" or (text.isdecimal() and int(text)):
        return text
    raise UsageError(f"{flag} {text}: a whole number, 1 or more, or auto")


def share(flag: str, text: str) -> float:
    """Read a share above 0 and up to 1, also as a percentage."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise UsageError(f"{flag} {text}: a share above 0 and up to 1, such as 0.01 or 1%")
    return value


def positive(flag: str, text: str) -> float:
    """Read a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{flag} {text}: must be a number above 0")
    return value


def fraction(flag: str, text: str) -> float:
    """Read a number from 0 up to but not including 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise UsageError(f"{flag} {text}: must be from 0 up to 1, without 1")
    return value


def level_list(flag: str, text: str) -> str:
    """Check "8,5,5,5": numbers of levels, from 2 to 256, of at most 2^16 codes in all."""
    parts = text.split(",")
    levels = tuple(int(part) for part in parts if part.isdecimal() and len(part) < 4)
    in_range = all(2 <= level <= 256 for level in levels)
    if len(levels) != len(parts) or not in_range or math.prod(levels) > 1 << 16:
        raise UsageError(
            f"{flag} {text}: write numbers of levels from 2 to 256, of at most 65,536 codes "
            "together, such as 8,5,5,5"
        )
    return text


def rate(flag: str, text: str) -> float:
    """Read a number of images per second, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"{flag} {text}: must be a number of images per second")
    return value
