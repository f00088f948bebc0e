"""The user's cache folder: indexes of data sets and the unpacked embedded set. Everything in it can be deleted and is made again."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
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


def keep_compiled_code_private() -> None:
    """To be called before torch.compile, which runs what it finds in its cache: by default a folder in /tmp, of a name that anyone can take
    first. Here it is in the user's cache folder, or, where others can write that one, new and gone with the process.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = cache_dir() / "torch.compile"
    try:
        _make_private(cache_dir())
        folder.mkdir(mode=0o700, exist_ok=True)
        private = _is_ours_alone(cache_dir()) and _is_ours_alone(folder)
    except OSError:
        private = False
    if not private:
        folder = Path(tempfile.mkdtemp(prefix="dad-fast-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _is_ours_alone(folder: Path) -> bool:
    found = folder.stat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
