"""Locks: one process at a time writes a folder or a file.

A lock is an flock, which the kernel drops with its owner: a killed process blocks nobody. The lock
of a folder also holds a record (host, process, start, command) whose time its owner renews. The
record names the owner in messages, and replaces the flock between machines whose shared file system
keeps flocks to one machine or has none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dad_fast.errors import DataError, UsageError, print_error
from dad_fast.files import disk_error

LOCK = ".lock"
# Seconds between two renewals of a record.
HEARTBEAT = 15.0
# Seconds without renewal after which the owner on another machine counts as dead.
STALE = 180.0
# Seconds that the processes of a killed owner may take to save. They inherit its lock.
ORPHANS = 60.0
# Seconds for a new owner to write its record.
RECORD = 2.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Busy(Exception):
    """Another process holds the lock."""


class NoLocks(DataError):
    """The file system has no locks."""


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock `path`, a file without a record, and remove it afterwards.

    Raises Busy when another process holds the lock and `wait` is False.
    """
    while True:
        handle = _open(path)
        try:
            _flock(handle, path, wait)
        except BaseException:
            os.close(handle)
            raise
        if _is_same(handle, path):
            break
        os.close(handle)

    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def lock_folder(folder: Path, file: Path | None = None, owner: int = 0) -> Iterator[int | None]:
    """Hold the lock of `folder`, which is made if it is missing; yield the lock's descriptor,
    or None in a folder that is read-only for everybody here.

    Children that inherit the descriptor (`pass_fds`) hold the lock too, until the last one ends.
    Nothing is left behind by a block that writes nothing. The same process may lock a folder again.

    file: the lock file, if it is not in the folder. owner: the process to name and to look for when
    it is not this one.

    Raises UsageError, with the owner, when another process holds the lock, and DataError when the
    lock cannot be written.
    """
    path = (file or folder / LOCK).absolute()
    key = os.path.realpath(path)
    if key in _held:
        yield _held[key].handle
        return
    if path.parent.exists() and not path.parent.is_dir():
        raise UsageError(f"--output {path.parent} is a file; name a folder")
    made = [one for one in (path.parent, *path.parent.parents) if not one.exists()]
    try:
        try:
            lock = _acquire(path, folder, _record(owner or os.getpid()))
        except OSError as error:
            # Nothing can be written there by anyone on this machine.
            if error.errno != errno.EROFS or not path.parent.is_dir():
                raise disk_error(error, folder) from error
            yield None
            return
        _held[key] = lock
        try:
            yield lock.handle
        finally:
            # A fork of this process has forgotten its locks.
            if _held.pop(key, None) is lock:
                lock.release()
    finally:
        for one in made:
            # A folder with files stays.
            with suppress(OSError):
                one.rmdir()


class _FolderLock:
    """A held lock. Its thread renews the record, and ends the process if another one took over."""

    def __init__(self, handle: int, path: Path, folder: Path, record: dict[str, Any]) -> None:
        self.handle, self.path, self.folder, self.record = handle, path, folder, record
        self._mutex = threading.Lock()
        self._released = threading.Event()
        threading.Thread(target=self._renew, daemon=True, name="lock").start()

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT):
            with self._mutex:
                if self._released.is_set():
                    return
                with suppress(OSError):
                    os.utime(self.handle)
                other = _read(self.handle)
            if other is not None and other != self.record:
                # This process was suspended for so long that it counted as dead. Saving would
                # damage the files of the new owner.
                print_error(
                    f"error: {self.folder}: taken over by {_describe(other)}; this process ends"
                )
                os._exit(DataError.exit_code)

    def release(self) -> None:
        with self._mutex:
            self._released.set()
            with suppress(OSError):
                if _is_same(self.handle, self.path) and _read(self.handle) == self.record:
                    self.path.unlink()
            os.close(self.handle)


# Locks of this process, by the real path of the file.
_held: dict[str, _FolderLock] = {}


def _forget() -> None:
    """Close the descriptors in a fork: it must not keep a lock whose owner has died."""
    for lock in _held.values():
        with suppress(OSError):
            os.close(lock.handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _acquire(path: Path, folder: Path, record: dict[str, Any]) -> _FolderLock:
    """Take the lock; wait where the owner may be dead. Raises UsageError when it is alive."""
    wait = _Wait(folder)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = _open(path)
        except FileNotFoundError:
            # The last owner removed the folder.
            continue
        try:
            free: bool | None = True
            try:
                _flock(handle, path, wait=False)
            except Busy:
                free = False
            except NoLocks:
                free = None
            if _is_same(handle, path) and wait.may_take(free, handle, path):
                _write(handle, path, record)
                return _FolderLock(handle, path, folder, record)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(wait.pause)


class _Wait:
    """Decides whether a lock may be taken, refused, or needs another look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pause = 0.0
        self._since = time.monotonic()
        self._told = False
        self._seen: tuple[Any, int] | None = None

    def may_take(self, free: bool | None, handle: int, path: Path) -> bool:
        """Return True for a free lock or a dead owner, False to look again.

        free: whether this process has the flock; None without flocks. Raises UsageError.
        """
        self.pause = 0.2
        record = _read(handle)
        if record is None:
            return free is not False or self._wait(RECORD, None)
        if record["boot"] != _boot():
            return self._watch(record, free, handle, path)
        if free:
            # The kernel dropped the lock with its owner.
            return True
        if record["pids"] == _pid_space():
            alive = _is_alive(record)
            return (free is None and not alive) or self._wait(0.0 if alive else ORPHANS, record)
        if free is False:
            return self._wait(0.0, record)
        return self._watch(record, free, handle, path)

    def _wait(self, seconds: float, record: dict[str, Any] | None) -> bool:
        if time.monotonic() - self._since >= seconds:
            self._refuse(record)
        if seconds > RECORD:
            self._tell(f"was killed; waiting up to {seconds:.0f} s until its processes end", record)
        return False

    def _watch(self, record: dict[str, Any], free: bool | None, handle: int, path: Path) -> bool:
        """Wait until the owner on another machine renews its record or counts as dead."""
        # Another process here must be able to look, too.
        self.pause = 1.0
        renewed = os.fstat(handle).st_mtime_ns
        if self._seen is None:
            self._seen = (record, renewed)
        age = _file_system_time(path.parent) - renewed / 1e9
        is_stale = max(age, time.monotonic() - self._since) > STALE
        if self._seen != (record, renewed) or (is_stale and free is False):
            self._refuse(record)
        if is_stale:
            print_error(
                f"{self.folder}: taken over from {_describe(record)}, silent for {age:.0f} s"
            )
            return True
        self._tell(f"may have died; waiting up to {STALE - age:.0f} s for a sign of it", record)
        return False

    def _tell(self, what: str, record: dict[str, Any] | None) -> None:
        if not self._told:
            self._told = True
            print_error(f"{self.folder}: {_describe(record)} {what}")

    def _refuse(self, record: dict[str, Any] | None) -> None:
        raise UsageError(
            f"--output {self.folder}: {_describe(record)} writes in it; wait for it, stop it, or "
            "name another folder"
        )


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags, 0o666)


def _flock(handle: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise Busy(str(path)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        why = f"this file system has no locks ({error.strerror})"
        raise NoLocks(f"{path}: {why}; write on another disk") from error


def _is_same(handle: int, path: Path) -> bool:
    """Return whether `path` is still the open file: its last owner may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _record(owner: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": owner,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["dad-fast", *sys.argv[1:]])[:1000],
        "born": _born(owner),
        "boot": _boot(),
        "pids": _pid_space(),
        "by": os.getpid(),
    }


def _write(handle: int, path: Path, record: dict[str, Any]) -> None:
    content = json.dumps(record).encode() + b"\n"
    try:
        os.ftruncate(handle, 0)
        written = 0
        # A disk may take less than it was given; the next call then writes the rest or fails.
        while written < len(content):
            written += os.pwrite(handle, content[written:], written)
        # Some disks report only now that they are full.
        os.fsync(handle)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _read(handle: int) -> dict[str, Any] | None:
    """Return the record; None for an old or a torn one."""
    try:
        record = json.loads(os.pread(handle, 8192, 0))
        kinds = {"host": str, "pid": int, "started": str, "born": str, "boot": str, "pids": str}
        sound = all(type(record[name]) is kind for name, kind in kinds.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if sound else None


def _describe(record: dict[str, Any] | None) -> str:
    if record is None:
        return "another process"
    return f"process {record['pid']} on {record['host'][:100]} (since {record['started'][:30]})"


def _is_alive(record: dict[str, Any]) -> bool:
    """Return whether the process lives, and its number was not given to another one."""
    try:
        os.kill(record["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return record["born"] == _born(record["pid"])


def _born(pid: int) -> str:
    """Return the start of a process in clock ticks; "" without /proc."""
    text = _text(f"/proc/{pid}/stat")
    state = text.rpartition(")")[2].split()
    # A zombie has died, but its parent does not know yet.
    return state[19] if len(state) > 19 and state[0] not in ("Z", "X") else ""


def _boot() -> str:
    """Return the name of the running kernel, which the containers of a machine share."""
    return _text("/proc/sys/kernel/random/boot_id") or socket.gethostname()


def _pid_space() -> str:
    """Return the space in which process numbers mean something: one per container."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def _file_system_time(folder: Path) -> float:
    """Return the time of the file system's clock, which may be that of a server."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
