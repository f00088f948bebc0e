"""Settings as TOML text and back. What `to_toml` writes, `from_toml` reads to an equal Config."""

from __future__ import annotations

import json
import re
from typing import Any

from dad_fast.config.fields import get, sections, settings
from dad_fast.config.resolve import Layers
from dad_fast.config.schema import Config


def to_toml(cfg: Config) -> str:
    """Every setting of `cfg`, each with its meaning as a comment."""
    lines = [_line(path, get(cfg, path)) for path in settings() if "." not in path]
    for section in sections():
        lines += ["", f"[{section}]"]
        lines += [
            _line(path, get(cfg, path)) for path in settings() if path.startswith(section + ".")
        ]
    for name, changes in cfg.variants.items():
        lines += ["", f"[variants.{_key(name)}]"]
        lines += [
            f"{'.'.join(map(_key, path.split('.')))} = {_value(value)}"
            for path, value in changes.items()
        ]
    return "\n".join(lines) + "\n"


def from_toml(text: str, where: str = "config") -> Config:
    """The Config that `text` describes; keys that it leaves out have their defaults. Raises UsageError."""
    layers = Layers()
    layers.add_toml(text, where)
    return layers.config()


def _line(path: str, value: Any) -> str:
    assignment = f"{path.rpartition('.')[2]} = {_value(value)}"
    return f"{assignment:<32}  # {settings()[path].help}"


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
    """JSON's escapes are TOML's, but for the one control character that JSON allows."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
