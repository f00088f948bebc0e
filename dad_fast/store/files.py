"""Files of a store: small files that are whole or absent, files that grow, and maps.

Temporary names are fixed, not random, so that the next process overwrites what a killed process
left.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from dad_fast.files import disk_error, sync

PART = ".part"  # suffix of a file that is not whole yet
Bytes = bytes | memoryview


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all. The caller holds the lock of `path`."""
    part = path.with_name(path.name + PART)
    try:
        # It may be left from a killed process, or be a link to another file.
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise disk_error(error, path) from error
    sync(path.parent)


class Part:
    """A file that grows by blocks. `undo` drops what was written or read since `accept`."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(final.name + PART)
        if final.exists() and not self.path.exists():
            # An earlier attempt ended between the renaming and the checksums.
            os.replace(final, self.path)
        if self.path.is_symlink() or (self.path.exists() and self.path.stat().st_nlink > 1):
            # A killed merge left a link to another store's file, which must stay as it is.
            self.path.unlink()
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # Accepted bytes; the file's position is after the pending ones.
        self.size = 0
        self.sha256 = hashlib.sha256()
        self._pending: list[Bytes] = []

    def write(self, content: Bytes) -> None:
        rest = memoryview(content)
        while len(rest):
            rest = rest[os.write(self.handle, rest) :]
        self._pending.append(content)

    def read(self, size: int) -> bytes:
        with open(self.handle, "rb", buffering=0, closefd=False) as file:
            content = b""
            while len(content) < size and (more := file.read(size - len(content))):
                content += more
        self._pending.append(content)
        return content

    def accept(self) -> None:
        for content in self._pending:
            self.sha256.update(content)
            self.size += len(content)
        self._pending.clear()

    def undo(self) -> None:
        self._pending.clear()
        os.ftruncate(self.handle, self.size)
        os.lseek(self.handle, self.size, os.SEEK_SET)

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


def map_file(path: Path) -> np.ndarray:
    """Map a file, read-only: uint8 [bytes]. Raises OSError.

    torch's map holds no file descriptor. numpy's holds one, so a store of a thousand files would
    reach the usual limit of 1,024 open files in every loader process.
    """
    import torch

    size = path.stat().st_size
    if size == 0:
        # An empty file cannot be mapped.
        return np.empty(0, np.uint8)
    try:
        array = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error
    array.flags.writeable = False
    return array
