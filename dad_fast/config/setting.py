"""Declare a setting: default, help text, flag and rule. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from enum import StrEnum
from typing import Any, NamedTuple


class Switch(StrEnum):
    """Value of a speed setting: auto, on or off.

    engine/choices.py decides `auto` by the device, and gives the engine plain booleans. Only ON is
    true, so code that meets an undecided `auto` computes as with OFF.
    """

    AUTO = "auto"
    ON = "on"
    OFF = "off"

    def __bool__(self) -> bool:
        return self is Switch.ON

    def __repr__(self) -> str:
        return repr(self.value)


# Word for a number that the run chooses, and the number that stands for it until then.
AUTO_WORD = "auto"
AUTO = -1


class Rule(NamedTuple):
    """Condition on a number, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("above 0", lambda value: value > 0)
NOT_NEGATIVE = Rule("0 or more", lambda value: value >= 0)
AT_LEAST_ONE = Rule("1 or more", lambda value: value >= 1)
# timm has models whose view pads the image: 1.15 times their crop.
CROP = Rule("between 0 and 4", lambda value: 0 <= value <= 4)
PROBABILITY = Rule("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Rule("0 or more and below 1", lambda value: 0 <= value < 1)
ALL_POSITIVE = Rule("numbers above 0", lambda values: all(value > 0 for value in values))
INTERVAL = Rule("two numbers above 0, the smaller first", lambda pair: 0 < pair[0] <= pair[1])
AREA = Rule(
    "two numbers above 0 and up to 1, the smaller first", lambda pair: 0 < pair[0] <= pair[1] <= 1
)


def setting(
    default: Any,
    text: str,
    flag: str = "",
    *,
    rule: Rule | None = None,
    short: str = "",
    main: bool = False,
    bare: tuple[str, ...] = (),
    auto: bool = False,
) -> Any:
    """Create a field with its help `text`, `flag` (and `short` flag) and `rule`.

    main: show it in the short `--help`. bare: the value of a list whose flag is given without one.
    auto: the number may be "auto", which is AUTO in a Config; the help text says what it means.
    """
    metadata = {
        "help": text,
        "flag": flag,
        "short": short,
        "rule": rule,
        "main": main,
        "bare": bare,
        "auto": auto,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)
