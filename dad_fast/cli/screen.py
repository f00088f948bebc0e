"""Help screens of at most 100 columns, generated from option classes and the settings' schema."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dad_fast.config.fields import Setting, settings
from dad_fast.config.flags import options_of

WIDTH = 100
_INDENT = 28
# Placeholders of settings that are text and name a file or a folder.
_FILES = {
    "data.data_dir": "DIR",
    "data.class_map": "FILE",
    "teacher.head": "FILE",
    "student.name": "NAME ...",
    "student.weights": "FILE",
    "student.init_from": "PATH",
}


def wants_help(arguments: Sequence[str]) -> bool:
    """Tell whether the command line asks for a help screen."""
    return any(argument in ("-h", "--help", "--help-all") for argument in arguments)


def fill(template: str, **blocks: str) -> str:
    """Return `template` with each {name} replaced by the block of that name; other braces stay."""
    for name, block in blocks.items():
        template = template.replace("{" + name + "}", block)
    return template.rstrip()


def option_lines(options: type, *, debug: bool = True) -> str:
    """Return the entries of the flags of the class `options`, with defaults, and of --debug."""
    lines = []
    for option in options_of(options):
        if not option.flag:
            continue
        has_default = option.default not in ("", (), 0, None) and " [" not in option.help
        default = f" [{option.default}]" if has_default else ""
        lines.append(two_columns(option.flag, option.help + default))
    if debug:
        lines.append(two_columns("--debug", "show tracebacks"))
    return "\n".join(lines)


def setting_lines(paths: Sequence[str]) -> str:
    """Return the entries of the settings at `paths`, with their defaults."""
    return "\n".join(setting_entry(settings()[path]) for path in paths)


def settings_for(texts: Mapping[str, str]) -> str:
    """Return entries of settings for a command in which they mean something of their own.

    texts: path -> help text, empty for the text of the schema.
    """
    table = settings()
    entries = [
        two_columns(flag_names(table[path]), text or table[path].help)
        for path, text in texts.items()
    ]
    return "\n".join(entries)


def setting_entry(setting: Setting, key: bool = False) -> str:
    """Return the entry of `setting` with its default; `key`: with its key, too."""
    names = flag_names(setting) if setting.flag else f"--set {setting.path}=..."
    default = _shown(setting.shown(setting.default))
    text = f"{setting.help} [{default}]" if default else setting.help
    if key and setting.flag:
        text += f" ({setting.path})"
    return two_columns(names, text)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default == {} else str(default)


def flag_names(setting: Setting) -> str:
    """Return the flags of `setting` with a placeholder, such as "-b, --batch-size N"."""
    short = f"{setting.short}, " if setting.short else ""
    if setting.type is bool:
        return f"{short}--[no-]{setting.flag[2:]}"
    return f"{short}{setting.flag} {_metavar(setting)}"


def _metavar(setting: Setting) -> str:
    if setting.choices:
        text = "|".join(setting.choices)
        return text if len(text) < 24 else "NAME"
    if typing.get_origin(setting.type) is tuple:
        if len(setting.default) == 2:
            return "A B"
        if float in typing.get_args(setting.type):
            return "X ..."
        return "[KIND ...]" if setting.bare else "NAME ..."
    if setting.type in (int, float):
        placeholder = "N" if setting.type is int else "X"
        return f"{placeholder}|auto" if setting.auto else placeholder
    return _FILES.get(setting.path, "NAME")


def two_columns(left: str, right: str) -> str:
    """Return `left` and the wrapped text `right` next to it, or below it if `left` is too long."""
    indent = " " * _INDENT
    if len(left) + 4 > _INDENT:
        below = textwrap.fill(right, WIDTH, initial_indent=indent, subsequent_indent=indent)
        return f"  {left}\n{below}"
    first = f"  {left:<{_INDENT - 2}}"
    return textwrap.fill(right, WIDTH, initial_indent=first, subsequent_indent=indent)
