"""The user's cache folder: indexes of data sets, the unpacked embedded set, compiled code.

Everything in it can be deleted and is made again.
"""

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
    """Return $DAD_FAST_CACHE, else $XDG_CACHE_HOME/dad-fast, else ~/.cache/dad-fast.

    The folder may not exist yet.
    """
    if own := os.environ.get("DAD_FAST_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "dad-fast"
    return Path.home() / ".cache" / "dad-fast"


def _make_private(folder: Path) -> None:
    """Create the cache with access for its user only; an existing one stays unchanged.

    It names the user's data, and programs trust its content.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def write_cache(path: Path, content: bytes) -> bool:
    """Write a cache file whole or not at all. Return False when the folder cannot be written."""
    try:
        _make_private(cache_dir())
        atomic_write_bytes(path, content)
    except OSError:
        return False
    return True


@contextmanager
def one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """Let one process at a time make the cache file `path`; the others wait and find the result.

    `what` describes the work in the log line of a waiting process. Without a writable cache folder
    or without locks in its file system no process waits.
    """
    handle = -1
    try:
        _make_private(cache_dir())
        path.parent.mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(path.with_suffix(".lock"), flags, 0o600)
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
            # Releases the lock, as does the death of the process.
            os.close(handle)


def keep_compiled_code_private() -> None:
    """Set a private cache folder for torch.compile; call this before it.

    torch.compile runs the code in its cache, by default a folder in /tmp whose name anyone can take
    first. This sets a folder in the user's cache, or a temporary one when others can write that
    cache.
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
