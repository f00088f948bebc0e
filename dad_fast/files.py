"""Atomic writes: temporary name in the same folder, sync, rename, sync the folder."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from dad_fast.errors import DataError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that readers, also after a crash, see the old file or the new one.

    Makes missing folders. Raises OSError that names `path` (no space, no permission); the temporary
    file is then removed and an existing `path` unchanged.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _begin(path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                # mkstemp makes 0600, which colleagues on a shared disk could not read.
                os.chmod(temporary, 0o666 & ~_UMASK)
                os.replace(temporary, path)
        except BaseException:
            # The disk may have become read-only; the first error is the one to report.
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync(path.parent)
    except OSError as error:
        if error.strerror:
            error.filename, error.filename2 = str(path), None
        raise


def _begin(path: Path) -> tuple[int, str]:
    """Create a temporary file next to `path`, locked while its writer lives.

    Removes temporary files of killed writers.
    """
    _remove_abandoned(path)
    while True:
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
        )
        if _lock(handle, temporary):
            return handle, temporary
        os.close(handle)


def _lock(handle: int, path: str | Path) -> bool:
    """Lock a new file, so that `_remove_abandoned` leaves it alone until `handle` closes.

    Returns False when `_remove_abandoned` was faster.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        # Without locks in the file system `_remove_abandoned` removes nothing either.
        return True
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of `path` whose writer is dead: their lock is free."""
    for name in os.listdir(path.parent):
        if not (name.startswith(f".{path.name}.") and name.endswith(".tmp")):
            continue
        left = path.parent / name
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(handle)


def no_link(path: str, flags: int) -> int:
    """Open a file to write it in place, but no symbolic link.

    In a folder from somebody else a link could lead to any file of the user's.
    """
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text with `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON of `plain` values with `atomic_write_bytes`."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    # A name that is not UTF-8 has surrogates; their Python escape is also JSON's.
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def disk_error(
    error: Exception, path: str | Path, then: str = "run the same command again"
) -> DataError:
    """Turn a failed write of `path` (an OSError, or safetensors' form of it) into a DataError."""
    why = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    if is_full(error):
        return DataError(
            f"{path}: the disk is full, or a limit is reached ({why}); make room and {then}"
        )
    return DataError(f"{path}: cannot be written ({why}); fix that and {then}")


def is_full(error: Exception) -> bool:
    if getattr(error, "errno", None) in _FULL:
        return True
    # safetensors keeps the number in its text only.
    return any(f"(os error {number})" in str(error) for number in _FULL)


def sync(path: Path) -> None:
    """Make a file's content, or a rename inside a folder, durable.

    Raises OSError that names `path`.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(handle)


def read_text(path: str | Path) -> str:
    """Return the text of a file that a user may have written, without a byte-order mark.

    Raises DataError for a file that cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def plain(value: Any) -> Any:
    """Convert `value` for JSON: paths and unknown objects to text, one-element tensors to numbers.

    Numbers that JSON lacks become "nan", "inf" and "-inf", which `float()` reads back.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        return plain(value.item())
    return str(value)


def _read_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


# Read once at import: reading sets the mask, which is not safe with other threads.
_UMASK = _read_umask()
