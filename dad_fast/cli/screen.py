"""Help screens, generated from option classes and the settings' schema.

They are made for 100 columns and wrapped anew for a narrower terminal.
"""

from __future__ import annotations

import re
import shutil
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
    """Return a screen for this terminal: `template` with each {name} replaced by that block.

    Other braces stay.
    """
    for name, block in blocks.items():
        template = template.replace("{" + name + "}", block)
    return narrowed(template.rstrip(), shutil.get_terminal_size((WIDTH, 50)).columns)


def narrowed(screen: str, columns: int) -> str:
    """Wrap lines of `screen` that are longer than `columns`, at least 60.

    Second columns stay aligned, paragraphs stay paragraphs, and examples can still be pasted.
    """
    columns = max(60, columns)
    if columns >= WIDTH:
        return screen
    return "\n".join(_narrow_entry(entry, columns) for entry in _entries(screen.splitlines()))


def _entries(lines: Sequence[str]) -> list[list[str]]:
    """Group lines: a paragraph, or an entry with what continues it further to the right."""
    entries: list[list[str]] = []
    before = ""
    for line in lines:
        is_title = _indent_of(before) == 0 and before.endswith(":")
        continues = before and line and not is_title and not before.endswith("\\")
        is_paragraph = _indent_of(before) == _indent_of(line) == 0
        if continues and (is_paragraph or _indent_of(line) > 8):
            entries[-1].append(line)
        else:
            entries.append([line])
        before = line
    return entries


def _narrow_entry(entry: list[str], columns: int) -> str:
    if max(map(len, entry)) <= columns:
        return "\n".join(entry)
    first, *others = entry
    indent = _indent_of(first)
    joined = " ".join([first, *(line.strip() for line in others)])
    if first.startswith("usage: "):
        # An optional flag stays together with its values.
        whole = re.sub(r"\[[^\]]*\]|\S+ \.\.\.", lambda m: m[0].replace(" ", "\0"), joined)
        return _wrap(whole, columns, " " * 11).replace("\0", " ")
    if re.match(r" {2}(\w+=\S+ )*dad-fast | {6}-", first):
        return _narrow_example(joined, columns, " " * (indent + 4))
    second_column = re.match(r" +\S.*?  +(?=\S)", first)
    if second_column:
        column = second_column.end()
        return _wrap(joined[column:], columns, " " * column, first[:column])
    if indent and others:
        # A flag that is too long for the first column.
        column = _indent_of(others[0])
        text = " ".join(line.strip() for line in others)
        return f"{first}\n{_wrap(text, columns, ' ' * column, ' ' * column)}"
    hanging = _indent_of(others[0]) if others else indent
    return _wrap(joined, columns, " " * hanging)


def _narrow_example(line: str, columns: int, indent: str) -> str:
    command, mark, comment = line.partition("  # ")
    # A flag stays together with its first value.
    whole = re.sub(r"(?<= )(--?[\w-]+) (?=[^-\\])", "\\1\0", command.rstrip())
    lines = _wrap(whole, columns - 2, indent).replace("\0", " ").splitlines()
    remark = f"\n{indent}# {comment}" if mark else ""
    return " \\\n".join(lines) + remark


def _wrap(text: str, columns: int, indent: str, first: str = "") -> str:
    return textwrap.fill(
        text,
        columns,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


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
        return f"  {left}\n{_wrap(right, WIDTH, indent, indent)}"
    return _wrap(right, WIDTH, indent, f"  {left:<{_INDENT - 2}}")
