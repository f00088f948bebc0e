"""A file of a shard that grows by blocks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dad_fast.store.lock import PART

Bytes = bytes | memoryview


class Part:
    """A file that grows by blocks. What was written or read since the last `accept` can be undone."""

    def __init__(self, final: Path) -> None:
        self.final, self.path = final, final.with_name(final.name + PART)
        if final.exists() and not self.path.exists():
            os.replace(
                final, self.path
            )  # an earlier attempt ended between the renaming and the checksums
        if self.path.is_symlink() or (self.path.exists() and self.path.stat().st_nlink > 1):
            self.path.unlink()  # another file too, since a merge that was killed: it must not be written to
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.size = 0  # accepted bytes; the file's position is behind the pending ones
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
