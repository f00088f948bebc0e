"""Files that are either whole or absent: temporary name in the same folder, sync, rename, sync the folder."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from dad_fast.errors import DataError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`; a reader, or a crash, sees the old file or the new one. Makes missing folders.

    Raises OSError (no space, no permission); the temporary file is then gone and an existing `path` unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes 0600, which colleagues on a shared disk could not read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` for UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """`atomic_write_bytes` for JSON, indented, with `plain` values."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))  # a name that is not UTF-8 has surrogates: JSON's own escape


def disk_error(error: Exception, path: str | Path, then: str = "run the same command again") -> DataError:
    """What a failed write of `path` means to the user: an OSError, or what safetensors made of one."""
    why = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    if is_full(error):
        return DataError(f"{path}: the disk is full, or a limit is reached ({why}); make room and {then}")
    return DataError(f"{path}: cannot be written ({why}); mend that and {then}")


def is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in str(error) for number in _FULL)


def sync(path: Path) -> None:
    """Make durable what a file holds, or a rename inside a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
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


_UMASK = _read_umask()  # read once at import: reading means setting, which is not safe beside other threads
