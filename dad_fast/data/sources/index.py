"""Indexes of images: each file's class, size and whether it can be decoded, verified once and kept.

A CSV in the user's cache folder (data is often read-only), one per image folder or per shard: path (which is the key as well), label,
offset, size and mtime of the file, width, height, format, ok, error. Its first line says what it is an index of and holds a checksum; a
damaged index is made again, as is one of another version. In a folder a file whose size or mtime has changed is verified again, so is a
new one; an interrupted build keeps what it has verified.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dad_fast.cache import cache_dir, one_at_a_time, write_cache
from dad_fast.cores import usable_cores
from dad_fast.data.sources.decode import EXTENSIONS, PLAIN_JPEG, image_format, open_image, reason
from dad_fast.data.sources.names import shown, some
from dad_fast.errors import DataError

log = logging.getLogger("dad_fast.data")

PENDING = "not verified"
_FORMAT = "# dad-fast index 4"
_CHUNK = 16  # files per task


class Entry(NamedTuple):
    """One image. `path` is relative to the indexed folder, or is a member's name; `mtime` is in nanoseconds, 0 in a shard, which has its
    own. `label` is a class folder's name or a class number in a shard; `format` is as `decode.image_format` says it.
    """

    path: str
    label: str
    offset: int
    size: int
    mtime: int
    width: int
    height: int
    format: str
    ok: bool
    error: str


Part = tuple[
    Callable[[Entry], Path | io.BytesIO], Sequence[Entry]
]  # entries, and how to get at what PIL opens


def build_index(folder: Path, classes: list[str]) -> list[Entry]:
    """The verified index of `folder`, whose sub-folders `classes` hold one class each, sorted by path.

    Raises DataError when a class has no images or a folder cannot be listed. Bad files are entries with `ok` False.
    """
    root = folder.resolve()
    file, about = index_file(root), f"folder {str(root)!r}"
    with threads() as pool:
        found = [
            entry
            for entries in pool.map(lambda label: _scan_class(root, label), classes)
            for entry in entries
        ]
    found.sort(key=lambda entry: entry.path)
    with one_at_a_time(file, f"indexing {folder}"):
        known = {entry.path: entry for entry in load_index(file, about)}
        entries: dict[str, Entry] = {}
        for entry in found:
            old = known.get(entry.path)
            if old is not None and (old.size, old.mtime) == (entry.size, entry.mtime):
                entries[entry.path] = old
        fresh = [entry for entry in found if entry.path not in entries]
        if fresh:
            try:
                for entry in verify_all([(lambda entry: root / entry.path, fresh)], str(folder)):
                    entries[entry.path] = entry
            finally:
                kept = (
                    {**known, **entries}.values() if len(entries) < len(found) else entries.values()
                )
                if not save_index(file, about, list(kept)):
                    log.warning(
                        "%s cannot be written: the index of %s is not kept and is made again next time",
                        file,
                        folder,
                    )
    return [entries[entry.path] for entry in found]


def index_file(path: Path) -> Path:
    """Where the index of a resolved folder or shard is kept."""
    return cache_dir() / "index" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.csv"


def load_index(file: Path, about: str) -> list[Entry]:
    """The entries of an index file; empty when it is absent, about something else, of another version or damaged."""
    try:
        head, _, body = file.read_bytes().partition(b"\n")
    except OSError:
        return []
    if (
        not head.startswith(_FORMAT.encode())
        or hashlib.sha256(body).hexdigest().encode() not in head
    ):
        log.warning("%s is damaged or of another version: it is made again", file)
        return []
    if not head.endswith(_encoded(f", {about}")):
        return []
    rows = csv.reader(io.StringIO(body.decode("utf-8", "surrogateescape"), newline=""))
    try:
        next(rows)
        return [
            Entry(
                path,
                label,
                int(offset),
                int(size),
                int(mtime),
                int(width),
                int(height),
                format,
                ok == "1",
                error,
            )
            for path, label, offset, size, mtime, width, height, format, ok, error in rows
        ]
    except (ValueError, StopIteration, csv.Error):
        log.warning("%s is no index: it is made again", file)
        return []


def save_index(file: Path, about: str, entries: list[Entry]) -> bool:
    """Write an index file whole or not at all; False when the cache folder cannot be written."""
    text = io.StringIO(newline="")
    writer = csv.writer(
        text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
    )  # names may hold line ends of any kind
    writer.writerow(Entry._fields)
    for entry in entries:
        writer.writerow(int(value) if isinstance(value, bool) else value for value in entry)
    body = text.getvalue().encode("utf-8", "surrogateescape")
    return write_cache(
        file,
        _encoded(f"{_FORMAT}, sha256 of what follows {hashlib.sha256(body).hexdigest()}, {about}")
        + b"\n"
        + body,
    )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def verify_all(parts: Sequence[Part], name: str) -> Iterator[Entry]:
    """The entries of all parts in their order, each decoded once if it is still `PENDING`. The log says so, a terminal shows a bar."""
    total = sum(len(entries) for _, entries in parts)
    if not total:
        return
    log.info("indexing %s: %s images to verify", name, f"{total:,}")
    tasks = [
        (content, entries[i : i + _CHUNK])
        for content, entries in parts
        for i in range(0, len(entries), _CHUNK)
    ]
    with (
        threads() as pool,
        progress_bar(total, f"indexing {name}") as advance,
    ):  # PIL decodes without the GIL
        for chunk in pool.map(lambda task: [_verify(entry, task[0]) for entry in task[1]], tasks):
            yield from chunk
            advance(len(chunk))


def _verify(entry: Entry, content: Callable[[Entry], Path | io.BytesIO]) -> Entry:
    """Decode the file. JPEGs at an eighth of the size: the whole stream is still read, so damage shows, at a fraction of the time."""
    if entry.error != PENDING:
        return entry
    try:
        with open_image(content(entry)) as image:
            width, height = image.size
            format = image_format(image)
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:  # see decode.read_rgb
        return entry._replace(ok=False, error=reason(error))
    return entry._replace(width=width, height=height, format=format, ok=True, error="")


class Files(NamedTuple):
    """What a source keeps of its index besides what every source has."""

    num_bytes: np.ndarray  # int64 [N]
    formats: np.ndarray  # uint8 [N], places in `format_names`
    format_names: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]  # name, fit for a message, and why, where `ok` is False

    def plain_jpeg(self, index: int) -> bool:
        return self.format_names[self.formats[index]] == PLAIN_JPEG


def files_of(entries: Sequence[Entry], name: Callable[[int], str]) -> Files:
    names = sorted({entry.format for entry in entries})[:256]
    place = {name: i for i, name in enumerate(names)}
    return Files(
        num_bytes=np.array([entry.size for entry in entries], dtype=np.int64),
        formats=np.array([place[entry.format] for entry in entries], dtype=np.uint8),
        format_names=tuple(names),
        bad=tuple((name(i), entry.error) for i, entry in enumerate(entries) if not entry.ok),
    )


def report_bad(
    source: str, bad: Sequence[tuple[str, str]], total: int, max_bad_share: float
) -> None:
    """Warn of unreadable images, given as (name, why); DataError when they are too many or all."""
    if not bad:
        return
    text = f"{source}: {len(bad):,} of {total:,} images cannot be read: {some(f'{name} ({why})' for name, why in bad)}"
    if len(bad) > max_bad_share * total or len(bad) == total:
        raise DataError(
            f"{text}; fix or remove them, or raise data.max_bad_share ({max_bad_share:g})"
        )
    log.warning("%s; each is replaced by the next valid image", text)


def _scan_class(root: Path, label: str) -> list[Entry]:
    """Entries of one class, not yet verified."""
    entries: list[Entry] = []
    try:
        _scan(root, label, label, (), entries)
    except OSError as error:
        raise DataError(
            f"{root / label}: cannot be listed: {error.strerror} (--data-dir)"
        ) from error
    if not entries:
        raise DataError(
            f"class folder {root / label} holds no images ({' '.join(EXTENSIONS)}); fill it, or leave the class out (--class-map)"
        )
    return entries


def _scan(
    root: Path, relative: str, label: str, above: tuple[tuple[int, int], ...], entries: list[Entry]
) -> None:
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
                entries.append(Entry(path, label, 0, size, mtime, 0, 0, "", False, PENDING))


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """One a core; when the block fails or is left early, nothing more is begun."""
    pool = ThreadPoolExecutor(num_threads())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def num_threads() -> int:
    cores = usable_cores()
    return min(32, cores)


@contextmanager
def progress_bar(total: int, text: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere nothing, since the log has said what is going on."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(shown(text), total=total)
        yield lambda count: progress.advance(task, count)
