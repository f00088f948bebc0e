"""Files that are either whole or absent: temporary name in the same folder, sync, rename, sync the folder."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from dad_fast.errors import DataError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`; a reader, or a crash, sees the old file or the new one. Makes missing folders.

    Raises OSError that names `path` (no space, no permission); the temporary file is then gone and an existing `path` unchanged.
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
                os.chmod(
                    temporary, 0o666 & ~_UMASK
                )  # mkstemp makes 0600, which colleagues on a shared disk could not read
                os.replace(temporary, path)
        except BaseException:
            with suppress(
                OSError
            ):  # on a disk that has become read-only; the first error is the one to tell
                os.unlink(temporary)
            raise
        sync(path.parent)
    except OSError as error:
        if error.strerror:
            error.filename, error.filename2 = str(path), None
        raise


def _begin(path: Path) -> tuple[int, str]:
    """A temporary file beside `path`, locked while its writer lives. What killed writers left there goes."""
    remove_abandoned(path.parent, f".{path.name}.", ".tmp")
    while True:
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
        )
        if hold(handle, temporary):
            return handle, temporary
        os.close(handle)


def hold(handle: int, path: str | Path) -> bool:
    """Lock a new file or folder, so that `remove_abandoned` leaves it alone until `handle` is closed. False: it was quicker."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: there nothing is removed either
        return True
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def remove_abandoned(folder: Path, prefix: str, suffix: str) -> None:
    """Remove the files and folders so named in `folder` whose writer lives no more: nobody holds their lock."""
    for name in os.listdir(folder):
        if not (name.startswith(prefix) and name.endswith(suffix)):
            continue
        left = folder / name
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            finally:
                os.close(handle)


def no_link(path: str, flags: int) -> int:
    """An opener for files that are written in place: in a folder that came from others a link could lead to any file of the user's."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` for UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """`atomic_write_bytes` for JSON, indented, with `plain` values."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write_bytes(
        path, text.encode(errors="backslashreplace")
    )  # a name that is not UTF-8 has surrogates: JSON's own escape


def disk_error(
    error: Exception, path: str | Path, then: str = "run the same command again"
) -> DataError:
    """What a failed write of `path` means to the user: an OSError, or what safetensors made of one."""
    why = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    if is_full(error):
        return DataError(
            f"{path}: the disk is full, or a limit is reached ({why}); make room and {then}"
        )
    return DataError(f"{path}: cannot be written ({why}); mend that and {then}")


def is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in _FULL or any(
        f"(os error {number})" in str(error) for number in _FULL
    )


def sync(path: Path) -> None:
    """Make durable what a file holds, or a rename inside a folder. Raises OSError that names `path`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: paths and unknown objects as text, one-element tensors as numbers.

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


_UMASK = (
    _read_umask()
)  # read once at import: reading means setting, which is not safe beside other threads
