"""Settings by keyword: the flags of the commands with underscores, such as batch_size=64."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dad_fast.config.fields import lookup, nearest, settings
from dad_fast.errors import UsageError

Names: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@functools.cache
def keywords() -> dict[str, str]:
    """Return keyword -> path of the setting, for every setting with a flag."""
    return {
        setting.flag.removeprefix("--").replace("-", "_"): path
        for path, setting in settings().items()
        if setting.flag
    }


def by_path(
    given: Mapping[str, Any],
    keys: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return path -> value of settings by keyword and of settings by key (`set=`).

    only: paths that the function takes; None = all. Raises UsageError for an unknown one.
    """
    known = {word: path for word, path in keywords().items() if only is None or path in only}
    found: dict[str, Any] = {}
    for word, value in given.items():
        if word not in known:
            raise UsageError(
                f"{word}: no such setting{nearest(word, known)}; keywords are the names of the flags "
                "(docs/api.md)"
            )
        found[known[word]] = value
    for key, value in (keys or {}).items():
        found[lookup(key, "set").path] = value
    return {path: _plain(path, value) for path, value in found.items() if value is not None}


def names(value: Names) -> list[str]:
    """Return one name or several as a list of texts."""
    if isinstance(value, str | os.PathLike):
        return [os.fspath(value)] if os.fspath(value) else []
    return [os.fspath(name) for name in value]


def files(value: Names) -> list[Path]:
    """Return one path or several as a list."""
    return [Path(name) for name in names(value)]


def _plain(path: str, value: Any) -> Any:
    """Return `value` as files of settings have it; True stands for a flag without a value."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(path, item) for item in value]
    bare = settings()[path].bare
    return list(bare) if value is True and bare else value
