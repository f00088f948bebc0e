"""The index of an image folder: every file's class, size and whether it can be decoded, verified once and kept.

A CSV in the user's cache folder (data is often read-only), one per folder: key, path, label (the class folder's name), width, height,
size and mtime of the file, jpeg, ok, error. Its first line holds a checksum; a damaged index is made again, as is one of another
version. A file whose size or mtime changed is verified again, so is a new one; an interrupted build keeps what it has verified.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from dad_fast.data.cache import cache_dir, write_cache
from dad_fast.data.decode import EXTENSIONS, is_plain_jpeg, reason
from dad_fast.errors import DataError

log = logging.getLogger("dad_fast.data")

_FORMAT = "# dad-fast index 2"
_COLUMNS = ("key", "path", "label", "width", "height", "size", "mtime", "jpeg", "ok", "error")
_CHUNK = 64  # files per task


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file. `path` is relative to the indexed folder and is the key as well; `mtime` is in nanoseconds.

    `jpeg`: a plain JPEG (see `is_plain_jpeg`), which any JPEG decoder shows alike.
    """

    path: str
    label: str
    width: int
    height: int
    size: int
    mtime: int
    jpeg: bool
    ok: bool
    error: str


def build_index(folder: Path, classes: list[str]) -> list[Entry]:
    """The verified index of `folder`, whose sub-folders `classes` hold one class each, sorted by path.

    Raises DataError when a class has no images or a folder cannot be listed. Bad files are entries with `ok` False.
    """
    root = folder.resolve()
    file = cache_dir() / "index" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.csv"
    with ThreadPoolExecutor(_threads()) as pool:
        found = [entry for entries in pool.map(lambda label: _scan_class(root, label), classes) for entry in entries]
    found.sort(key=lambda entry: entry.path)
    known = {entry.path: entry for entry in load_index(file)}
    entries: dict[str, Entry] = {}
    for entry in found:
        old = known.get(entry.path)
        if old is not None and (old.size, old.mtime) == (entry.size, entry.mtime):
            entries[entry.path] = old
    fresh = [entry for entry in found if entry.path not in entries]
    if fresh:
        log.info("indexing %s: %s of %s images to verify", folder, f"{len(fresh):,}", f"{len(found):,}")
        try:
            with _progress(len(fresh), f"indexing {folder}") as advance:
                for entry in _verify_all(root, fresh, advance):
                    entries[entry.path] = entry
        finally:
            kept = {**known, **entries}.values() if len(entries) < len(found) else entries.values()
            if not save_index(file, root, list(kept)):
                log.warning("%s cannot be written: the index of %s is not kept and is made again next time", file, folder)
    return [entries[entry.path] for entry in found]


def load_index(file: Path) -> list[Entry]:
    """The entries of an index file; empty when it is absent, of another version or damaged."""
    try:
        head, _, body = file.read_bytes().partition(b"\n")
    except OSError:
        return []
    if not head.startswith(_FORMAT.encode()) or hashlib.sha256(body).hexdigest().encode() not in head:
        log.warning("%s is damaged or of another version: the folder is indexed again", file)
        return []
    rows = csv.reader(io.StringIO(body.decode("utf-8", "surrogateescape"), newline=""))
    next(rows)
    return [
        Entry(path, label, int(width), int(height), int(size), int(mtime), jpeg == "1", ok == "1", error)
        for _, path, label, width, height, size, mtime, jpeg, ok, error in rows
    ]


def save_index(file: Path, root: Path, entries: list[Entry]) -> bool:
    """Write an index file whole or not at all; False when the cache folder cannot be written."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for e in entries:
        writer.writerow((e.path, e.path, e.label, e.width, e.height, e.size, e.mtime, int(e.jpeg), int(e.ok), e.error))
    body = text.getvalue().encode("utf-8", "surrogateescape")
    head = f"{_FORMAT}, sha256 of what follows {hashlib.sha256(body).hexdigest()}, folder {str(root)!r}\n"
    return write_cache(file, head.encode("utf-8", "backslashreplace") + body)


def _scan_class(root: Path, label: str) -> list[Entry]:
    """Entries of one class, not yet verified."""
    entries: list[Entry] = []
    try:
        _scan(root, label, label, (), entries)
    except OSError as error:
        raise DataError(f"{root / label}: cannot be listed: {error.strerror} (--data-dir)") from error
    if not entries:
        raise DataError(
            f"class folder {root / label} holds no images ({' '.join(EXTENSIONS)}); fill it, or leave the class out (--class-map)"
        )
    return entries


def _scan(root: Path, relative: str, label: str, above: tuple[tuple[int, int], ...], entries: list[Entry]) -> None:
    """Collect images below `relative`, through symbolic links; `above` are the folders on the way here, so that a loop ends."""
    here = os.stat(root / relative)
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    with os.scandir(root / relative) as listing:
        for item in listing:
            if item.name.startswith("."):  # also the ._NAME.jpg that macOS leaves on foreign disks
                continue
            path = f"{relative}/{item.name}"
            if item.is_dir():
                _scan(root, path, label, (*above, identity), entries)
            elif item.name.lower().endswith(EXTENSIONS):
                try:
                    stat = item.stat()
                    size, mtime = stat.st_size, stat.st_mtime_ns
                except OSError:  # a link to nowhere: a bad file, not an absent one
                    size, mtime = 0, 0
                entries.append(Entry(path, label, 0, 0, size, mtime, False, False, "not verified"))


def _verify_all(root: Path, entries: list[Entry], advance: Callable[[int], None]) -> Iterator[Entry]:
    chunks = [entries[i : i + _CHUNK] for i in range(0, len(entries), _CHUNK)]
    pool = ThreadPoolExecutor(_threads())  # PIL decodes without the GIL
    try:
        for chunk in pool.map(lambda part: [_verify(root, entry) for entry in part], chunks):
            yield from chunk
            advance(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)


def _verify(root: Path, entry: Entry) -> Entry:
    """Decode the file. JPEGs at an eighth of the size: the whole stream is still read, so damage shows, at a fraction of the time."""
    try:
        with Image.open(root / entry.path) as image:
            width, height = image.size
            jpeg = is_plain_jpeg(image)
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:  # see decode.read_rgb
        return replace(entry, ok=False, error=reason(error))
    return replace(entry, width=width, height=height, jpeg=jpeg, ok=True, error="")


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, cores)


@contextmanager
def _progress(total: int, text: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere nothing, since the log has said what is going on."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=total)
        yield lambda count: progress.advance(task, count)
