"""The user's cache folder: indexes of data sets and the unpacked embedded set. Everything in it can be deleted and is made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """$DAD_FAST_CACHE, else $XDG_CACHE_HOME/dad-fast, else ~/.cache/dad-fast. Not created here."""
    if own := os.environ.get("DAD_FAST_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "dad-fast"
    return Path.home() / ".cache" / "dad-fast"


def write_cache(path: Path, content: bytes) -> bool:
    """Write a cache file whole or not at all. False when the folder cannot be written: a cache is a convenience, not a need."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        return False
    return True
