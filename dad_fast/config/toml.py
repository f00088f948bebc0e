"""Conversion of settings to TOML text and back, without loss."""

from __future__ import annotations

import json
import re
from typing import Any

from dad_fast.config.fields import get, sections, settings
from dad_fast.config.resolve import Layers
from dad_fast.config.schema import Config


def to_toml(cfg: Config) -> str:
    """Return every setting of `cfg` as TOML, each with its help text as a comment."""
    lines = [_line(path, get(cfg, path)) for path in settings() if "." not in path]
    for section in sections():
        lines += ["", f"[{section}]"]
        lines += [
            _line(path, get(cfg, path)) for path in settings() if path.startswith(section + ".")
        ]
    for label, changes in cfg.students.items():
        lines += ["", "[[students]]", f"label = {_value(label)}"]
        lines += [_change(path.removeprefix("student."), path, changes[path]) for path in changes]
    for name, changes in cfg.variants.items():
        lines += ["", f"[variants.{_key(name)}]"]
        lines += [_change(path, path, value) for path, value in changes.items()]
    return "\n".join(lines) + "\n"


def _change(key: str, path: str, value: Any) -> str:
    dotted = ".".join(map(_key, key.split(".")))
    return f"{dotted} = {_value(settings()[path].shown(value))}"


def from_toml(text: str, where: str = "config") -> Config:
    """Parse a Config; missing keys have their defaults. Raises UsageError."""
    layers = Layers()
    layers.add_toml(text, where)
    return layers.config()


def _line(path: str, value: Any) -> str:
    setting = settings()[path]
    assignment = f"{path.rpartition('.')[2]} = {_value(setting.shown(value))}"
    return f"{assignment:<32}  # {setting.help}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return _string(value) if isinstance(value, str) else repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _string(text: str) -> str:
    """Quote `text`. JSON escapes like TOML, except for DEL, which JSON does not escape."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
