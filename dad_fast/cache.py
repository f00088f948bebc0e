"""The user's cache folder: indexes of data sets and the unpacked embedded set. Everything in it can be deleted and is made again."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dad_fast.files import atomic_write_bytes

log = logging.getLogger("dad_fast.data")


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


@contextmanager
def one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """The block is of one process at a time, among those that make the cache file `path`: the others wait, and find what it made.

    `what` says it to a user who waits. Where the cache folder cannot be written or has no locks nobody waits.
    """
    handle = -1
    try:
        _make_private(cache_dir())
        path.parent.mkdir(exist_ok=True)
        handle = os.open(
            path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is %s: waiting for it", what)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)  # and the lock with it, as when the process is killed


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
