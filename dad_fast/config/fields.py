"""The schema as a flat table of settings ("optim.lr"), and the one place where a value gets its type."""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal

from dad_fast.config.schema import Config
from dad_fast.config.setting import Rule
from dad_fast.errors import UsageError

# What people who know timm type, where this project has another word for it.
OTHER_NAMES = {
    "--model": "--student",
    "--initial-checkpoint": "--student-weights",
    "--kd-model-name": "--teacher",
    "--teacher-model": "--teacher",
    "--checkpoint": "CKPT without a flag",
    "--config": "CONFIG.toml without a flag",
    "--experiment": "--output",
    "--log-interval": "--log-every",
    "--checkpoint-hist": "--set checkpoint.keep=N",
    "--validation-batch-size": "--val-batch-size",
    "--val-interval": "--val-every",
    "--model-kwargs": "--set student.model_kwargs.KEY=VALUE",
    "--opt-kwargs": "--set optim.opt_kwargs.KEY=VALUE",
    "--opt-betas": "--set optim.opt_kwargs.betas=[0.9,0.999]",
    "--opt-eps": "--set optim.opt_kwargs.eps=1e-8",
    "--epsilon": "--attack-eps",
    "--vqgan": "--discretizer",
    "--learning-rate": "--lr",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--store-views": "--stores KIND:VIEWS",
}

_LONGEST, _DEEPEST = (
    1_000_000,
    100,
)  # characters of settings, dots of a key: reading takes time with the square of these


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the schema. `path` is "section.key" ("key" for the settings of `Config` itself)."""

    path: str
    type: Any
    default: Any
    help: str
    flag: str
    short: str
    rule: Rule | None
    main: bool
    bare: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()


@functools.cache
def settings() -> dict[str, Setting]:
    """Every setting but `variants`, by path, in the order of the schema."""
    table: dict[str, Setting] = {}
    for section, cls in {"": Config, **sections()}.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]) or field.name == "variants":
                continue
            path = f"{section}.{field.name}" if section else field.name
            default = (
                field.default
                if field.default_factory is dataclasses.MISSING
                else field.default_factory()
            )
            table[path] = Setting(path, hints[field.name], default, **field.metadata)
    return table


@functools.cache
def sections() -> dict[str, type]:
    hints = typing.get_type_hints(Config)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(Config)
        if dataclasses.is_dataclass(hints[field.name])
    }


def get(cfg: Config, path: str) -> Any:
    section, _, key = path.rpartition(".")
    return getattr(getattr(cfg, section) if section else cfg, key)


def with_values(cfg: Config, values: dict[str, Any]) -> Config:
    """A copy of `cfg` in which the settings at the given paths have the given (already coerced) values."""
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, _, key = path.rpartition(".")
        nested.setdefault(section, {})[key] = value
    top = nested.pop("", {})
    return dataclasses.replace(
        cfg,
        **top,
        **{name: dataclasses.replace(getattr(cfg, name), **keys) for name, keys in nested.items()},
    )


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """', did you mean ...?', or nothing where no known word is near."""
    known = list(known)
    longer = [name for name in known if name.startswith(word)]
    matches = (
        longer[:3] if len(word) > 3 and longer else get_close_matches(word, known, n=1, cutoff=0.6)
    )
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def lookup(path: str, where: str) -> Setting:
    """The setting at `path`. Raises UsageError with the nearest known path; `where` says who asked."""
    table = settings()
    if path in table:
        return table[path]
    if path in sections():
        raise UsageError(
            f"{where}: {path} is a section; give one of its keys, such as {next(p for p in table if p.startswith(path + '.'))}"
        )
    key = path.rpartition(".")[2]
    by_key = [
        known
        for known, setting in table.items()
        if key in (known.rpartition(".")[2], setting.flag[2:].replace("-", "_"))
    ]
    other = OTHER_NAMES.get("--" + key.replace("_", "-"))
    hint = (
        f"; did you mean {by_key[0] if by_key else other}?"
        if by_key or other
        else nearest(path, table)
    )
    raise UsageError(
        f"{where}: unknown key {path}{hint or '; dad-fast train --help-all lists every key'}"
    )


def flatten(tables: dict[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings in nested TOML tables as (path, value)."""
    for key, value in tables.items():
        path = prefix + key
        if path in sections():
            if not isinstance(value, dict):
                raise UsageError(
                    f"{where}: {path} is a section: write [{path}] with its keys under it"
                )
            yield from flatten(value, where, path + ".")
        elif isinstance(value, dict) and path not in settings():
            raise UsageError(
                f"{where}: unknown section [{path}]{nearest(path, sections())} (known: {', '.join(sections())}, variants)"
            )
        else:
            yield path, value


def coerce(setting: Setting, value: Any, where: str) -> Any:
    """`value` (from TOML, or text from the command line) in the type of `setting`, or UsageError naming `where`."""
    try:
        result = _coerce(setting.type, value)
    except ValueError as error:
        raise UsageError(f"{_at(setting, where)} {error}, got {value!r}") from None
    if setting.rule and not setting.rule.holds(result):
        raise UsageError(f"{_at(setting, where)} must be {setting.rule.words}, got {value!r}")
    return result


def _at(setting: Setting, where: str) -> str:
    """Where a wrong value stands, and how to set the right one: one name where both are the flag."""
    if where == setting.flag:
        return where
    flag = f" ({setting.flag})" if setting.flag else ""
    return f"{where}: {setting.path}{flag}"


def _coerce(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value
    if origin is tuple:
        return _tuple(typing.get_args(kind), value)
    if origin in (typing.Union, types.UnionType):  # text or a list of texts
        is_list = isinstance(value, list | tuple) or (
            isinstance(value, str) and value.startswith("[")
        )
        return _coerce(
            next(k for k in typing.get_args(kind) if (typing.get_origin(k) is tuple) == is_list),
            value,
        )
    if origin is dict:
        value = toml_value(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError("must be a table, such as {key = 1}")
        return value
    return {bool: _bool, int: _int, float: _float, str: _text}[kind](value)


def _tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = (
            toml_value(value)
            if value.startswith("[")
            else [part for part in value.split(",") if part]
        )
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list")
    if kinds[-1] is Ellipsis:
        return tuple(_coerce(kinds[0], item) for item in value)
    if len(value) != len(kinds):
        raise ValueError(f"needs {len(kinds)} values")
    return tuple(_coerce(kind, item) for kind, item in zip(kinds, value, strict=True))


def _bool(value: Any) -> bool:
    words = {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("must be a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    if "\x00" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError("must be UTF-8 text without NUL")
    return value


def read_toml(text: str) -> dict[str, Any]:
    """What TOML text says. Raises ValueError, of which tomllib.TOMLDecodeError is for its form."""
    if len(text) > _LONGEST or any(
        line.partition("=")[0].count(".") > _DEEPEST for line in text.split("\n") if "=" in line
    ):
        raise ValueError(
            f"longer than {_LONGEST:,} characters, or a key of more than {_DEEPEST} parts"
        )
    try:
        tables = tomllib.loads(text)
        _check_numbers(tables)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return tables


def _check_numbers(value: Any) -> None:
    """Raises ValueError for a number that Python could not even print: tomllib reads a hexadecimal of any length."""
    if isinstance(value, int) and value.bit_length() > 128:
        raise ValueError("a number of more than 128 bits")
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        _check_numbers(item)


def toml_value(text: str) -> Any:
    """`text` read as a TOML value; text that is none stays text."""
    try:
        return read_toml(f"value = {text}")["value"]
    except ValueError:
        if text[:1] in "[{":
            raise ValueError("is not a TOML value") from None
        return text
