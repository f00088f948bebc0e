"""Flat table of the schema's settings ("optim.lr"), and conversion of values to their types."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal

from dad_fast.config.schema import Config
from dad_fast.config.setting import AUTO, AUTO_WORD, Rule, Switch
from dad_fast.errors import UsageError

# Flags of timm and other trainers -> this project's flags of the same meaning.
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
    "--lr-cycle-limit": "--set schedule.sched_kwargs.cycle_limit=N",
    "--lr-cycle-mul": "--set schedule.sched_kwargs.cycle_mul=X",
    "--lr-k-decay": "--set schedule.sched_kwargs.k_decay=X",
    "--lr-noise": "--set schedule.sched_kwargs.noise=[A,B]",
    "--epsilon": "--attack-eps",
    "--vqgan": "--discretizer",
    "--learning-rate": "--lr",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--store-views": "--stores KIND:VIEWS",
    "--no-amp": "--amp off",
    "--no-channels-last": "--channels-last off",
    "--no-torchcompile": "--torchcompile off",
    "--wandb": "--log-to wandb",
    "--log-wandb": "--log-to wandb",
    "--num-workers": "--workers",
}

# Keys of earlier versions -> today's; files and checkpoints may hold them.
RENAMED = {"engine.step_kernels": "engine.kernels"}

# A setting -> the one that decides in its place where one layer gives both.
DECIDED_BY = {"data.batch_size": "data.global_batch_size", "optim.lr": "optim.lr_base"}

# A variant's name and a student's label become folders.
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")

# Fields of Config that expand into several runs.
TABLES_OF_RUNS = ("students", "variants")

# Limits of TOML text, since parsing time grows with their square: characters, dots of a key.
_LONGEST = 1_000_000
_DEEPEST = 100


@dataclasses.dataclass(frozen=True)
class Setting:
    """Leaf of the schema. `path` is "section.key" ("key" for the settings of `Config` itself)."""

    path: str
    type: Any
    default: Any
    help: str
    flag: str
    short: str
    rule: Rule | None
    main: bool
    bare: tuple[str, ...]
    auto: bool

    @property
    def is_switch(self) -> bool:
        """True for auto, on or off, whose flag alone means on."""
        return isinstance(self.default, Switch)

    @property
    def takes_name(self) -> bool:
        """True for a switch whose value may also be a name."""
        return self.is_switch and str in typing.get_args(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        if self.is_switch:
            return (*Switch, "NAME") if self.takes_name else tuple(Switch)
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    def shown(self, value: Any) -> Any:
        """Return `value` as files and help screens have it: the word for AUTO."""
        return AUTO_WORD if self.auto and value == AUTO else value


@functools.cache
def settings() -> dict[str, Setting]:
    """Return every setting except `students` and `variants`, by path, in the order of the schema."""
    table: dict[str, Setting] = {}
    for section, cls in {"": Config, **sections()}.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]) or field.name in TABLES_OF_RUNS:
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
    """Return the dataclass of every section, by name."""
    hints = typing.get_type_hints(Config)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(Config)
        if dataclasses.is_dataclass(hints[field.name])
    }


def get(cfg: Config, path: str) -> Any:
    """Return the value of the setting at `path`."""
    section, _, key = path.rpartition(".")
    return getattr(getattr(cfg, section) if section else cfg, key)


def with_values(cfg: Config, values: dict[str, Any]) -> Config:
    """Return a copy of `cfg` with the given (already coerced) values at the given paths."""
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, _, key = path.rpartition(".")
        nested.setdefault(section, {})[key] = value
    top = nested.pop("", {})
    changed = {
        name: dataclasses.replace(getattr(cfg, name), **keys) for name, keys in nested.items()
    }
    return dataclasses.replace(cfg, **top, **changed)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return '; did you mean ...?', or '' if no known word is similar."""
    known = list(known)
    longer = [name for name in known if name.startswith(word)]
    if word in known:
        matches = [word]
    elif len(word) > 3 and longer:
        matches = longer[:3]
    else:
        matches = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def lookup(path: str, where: str) -> Setting:
    """Return the setting at `path`.

    Raises UsageError, which names `where` and the nearest known path.
    """
    table = settings()
    if path in table:
        return table[path]
    if path in sections():
        example = next(known for known in table if known.startswith(f"{path}."))
        raise UsageError(f"{where}: {path} is a section; give one of its keys, such as {example}")
    key = path.rpartition(".")[2]
    by_key = [
        known
        for known, setting in table.items()
        if key in (known.rpartition(".")[2], setting.flag[2:].replace("-", "_"))
    ]
    other = OTHER_NAMES.get("--" + key.replace("_", "-"))
    same = by_key[0] if by_key else other
    hint = f"; did you mean {same}?" if same else nearest(path, table)
    hint = hint or "; dad-fast train --help-all lists every key"
    raise UsageError(f"{where}: unknown key {path}{hint}")


def flatten(tables: dict[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings in nested TOML tables as (path, value)."""
    for key, value in tables.items():
        path = prefix + key
        if path in sections():
            if not isinstance(value, dict):
                raise UsageError(
                    f"{where}: {path} is a section: write [{path}] with its keys under it"
                )
            yield from flatten(value, where, path + ".")
        elif isinstance(value, dict) and path not in settings():
            hint = nearest(path, sections())
            known = ", ".join([*sections(), *TABLES_OF_RUNS])
            raise UsageError(f"{where}: unknown section [{path}]{hint} (known: {known})")
        else:
            yield path, value


def coerce(setting: Setting, value: Any, where: str) -> Any:
    """Convert `value` (from TOML, or text from the command line) to the type of `setting`.

    Raises UsageError, which names `where`.
    """
    if setting.auto and value in (AUTO, AUTO_WORD):
        return AUTO
    auto = f", or {AUTO_WORD}" if setting.auto else ""
    try:
        result = _coerce(setting.type, value)
    except ValueError as error:
        raise UsageError(f"{_at(setting, where)} {error}{auto}, got {value!r}") from None
    if setting.rule and not setting.rule.holds(result):
        words = f"{setting.rule.words}{auto}"
        raise UsageError(f"{_at(setting, where)} must be {words}, got {value!r}")
    return result


def _at(setting: Setting, where: str) -> str:
    """Return `where` with the setting's path and flag, or the flag alone if it is `where`."""
    if where == setting.flag:
        return where
    flag = f" ({setting.flag})" if setting.flag else ""
    return f"{where}: {setting.path}{flag}"


def _coerce(kind: Any, value: Any) -> Any:
    if kind is Switch:
        return _switch(value)
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if "on" in choices and "off" in choices:
            # These settings were true or false once.
            value = {"true": "on", "false": "off"}.get(str(value).lower(), value)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value
    if origin is tuple:
        return _tuple(typing.get_args(kind), value)
    if origin in (typing.Union, types.UnionType):
        members = typing.get_args(kind)
        if Switch in members and str in members:
            return _switch_or_name(value)
        # Text, or a list of texts.
        is_list_text = isinstance(value, str) and value.startswith("[")
        is_list = isinstance(value, list | tuple) or is_list_text
        for member in members:
            if (typing.get_origin(member) is tuple) == is_list:
                return _coerce(member, value)
    if origin is dict:
        value = toml_value(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError("must be a table, such as {key = 1}")
        return value
    return {bool: _bool, int: _int, float: _float, str: _text}[kind](value)


def _tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        is_toml = value.startswith("[")
        value = toml_value(value) if is_toml else [part for part in value.split(",") if part]
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list")
    if kinds[-1] is Ellipsis:
        return tuple(_coerce(kinds[0], item) for item in value)
    if len(value) != len(kinds):
        raise ValueError(f"needs {len(kinds)} values")
    return tuple(_coerce(kind, item) for kind, item in zip(kinds, value, strict=True))


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError("must be true or false")


def _switch(value: Any) -> Switch:
    """Read auto, on or off; also true and false, as files of earlier versions have them."""
    if value in tuple(Switch):
        return Switch(value)
    try:
        return Switch.ON if _bool(value) else Switch.OFF
    except ValueError:
        raise ValueError(f"must be one of {', '.join(Switch)}") from None


def _switch_or_name(value: Any) -> Switch | str:
    try:
        return _switch(value)
    except ValueError as error:
        if isinstance(value, str) and value.isidentifier():
            return value
        raise ValueError(f"{error}, or a name") from None


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
    """Parse TOML text. Raises ValueError, which is a tomllib.TOMLDecodeError for wrong syntax."""
    keys = (line.partition("=")[0] for line in text.split("\n") if "=" in line)
    if len(text) > _LONGEST or any(key.count(".") > _DEEPEST for key in keys):
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
    """Raise ValueError for integers too long to print: tomllib reads any hexadecimal."""
    if isinstance(value, int) and value.bit_length() > 128:
        raise ValueError("a number of more than 128 bits")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_numbers(item)


def toml_value(text: str) -> Any:
    """Parse `text` as a TOML value. Other text stays text."""
    try:
        return read_toml(f"value = {text}")["value"]
    except ValueError:
        if text[:1] in "[{":
            raise ValueError("is not a TOML value") from None
        return text
