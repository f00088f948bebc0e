"""Locks between processes, and small files that are either whole or absent.

A lock is an flock on a file of its own: the kernel drops it with its owner, so that a killed process blocks nobody. Temporary names are
fixed, not random, so that what a killed process leaves is overwritten by the next one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dad_fast.errors import DataError
from dad_fast.files import disk_error, sync

PART = ".part"  # after the name of a file that is not whole yet
LOCK = ".lock"


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock `path`; its file goes with it. Raises Busy when another process holds it and this one must not wait."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_same(handle, path):  # else its last owner removed the file before we had it
                break
        except BlockingIOError as error:
            os.close(handle)
            raise Busy(str(path)) from error
        except OSError as error:
            os.close(handle)
            raise DataError(
                f"{path}: this file system has no locks ({error.strerror}); a store cannot be written here"
            ) from error
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all. The caller holds the lock that covers `path`."""
    part = path.with_name(path.name + PART)
    try:
        part.unlink(missing_ok=True)  # what a killed process left, or a link to something else
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise disk_error(error, path) from error
    sync(path.parent)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
