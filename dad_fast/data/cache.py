"""The user's cache folder: indexes of data sets and the unpacked embedded set. Everything in it can be deleted and is made again."""

from __future__ import annotations

import os
from pathlib import Path

from dad_fast.files import atomic_write_bytes


def cache_dir() -> Path:
    """$DAD_FAST_CACHE, else $XDG_CACHE_HOME/dad-fast, else ~/.cache/dad-fast. Not created here."""
    if own := os.environ.get("DAD_FAST_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "dad-fast"
    return Path.home() / ".cache" / "dad-fast"


def _make_private(folder: Path) -> None:
    """A new cache belongs to its user alone: it names the user's data, and what is in it is read again. An existing one stays as it is."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def write_cache(path: Path, content: bytes) -> bool:
    """Write a cache file whole or not at all. False when the folder cannot be written: a cache is a convenience, not a need."""
    try:
        _make_private(cache_dir())
        atomic_write_bytes(path, content)
    except OSError:
        return False
    return True
