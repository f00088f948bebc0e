"""Indexes of images: class, size and readability of each file, verified once and cached.

An index is a CSV in the user's cache folder (data is often read-only), one per image folder or
shard: path (also the key), label, offset, size and mtime of the file, width, height, format, ok,
error. Its first line names the indexed folder or shard and holds a checksum; a damaged index or one
of another version is made again. In a folder, new files and those of another size or mtime are
verified again. An interrupted build keeps the entries that it has verified.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dad_fast.cache import cache_dir, one_at_a_time, write_cache
from dad_fast.data.sources.decode import (
    EXTENSIONS,
    FEW_BITS,
    PLAIN_JPEG,
    image_format,
    is_deep,
    open_image,
    reason,
    to_rgb,
)
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.pool import progress_bar, threads
from dad_fast.errors import DataError

log = logging.getLogger("dad_fast.data")

PENDING = "not verified"
_FORMAT = "# dad-fast index 5"
# Files per task.
_CHUNK = 16


class Entry(NamedTuple):
    """One image.

    `path` is relative to the indexed folder, or a member's name; `mtime` is in nanoseconds, 0 in a
    shard, which has its own. `label` is a class folder's name, or a class number in a shard;
    `format` comes from `decode.image_format`.
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


# Entries, and a function that returns for an entry what PIL opens.
Part = tuple[Callable[[Entry], Path | io.BytesIO], Sequence[Entry]]


def build_index(folder: Path, classes: list[str] | None) -> list[Entry]:
    """Return the verified index of `folder`, sorted by path.

    Its sub-folders `classes` hold one class each; None: all images in it and below, without labels.
    Raises DataError when a class has no images or a folder cannot be listed. Bad files are entries
    with `ok` False. Files that are not images by their extension, and images next to the class
    folders, are counted in a warning.
    """
    root = folder.resolve()
    about = f"folder {str(root)!r}"
    if classes is None:
        about += ", without labels"
    file = index_file(root if classes is not None else root / "\0without labels")
    found, others = scan_folder(root, [""] if classes is None else classes)
    _report_left_out(folder, others, stray=classes is not None)
    return index_entries(file, about, root, found, str(folder))


def index_entries(
    file: Path, about: str, root: Path, found: Sequence[Entry], name: str
) -> list[Entry]:
    """Return `found`, entries of files below `root`, verified; unchanged files from the index
    `file`, which is written. `name` stands for the data set in messages.
    """
    with one_at_a_time(file, f"indexing {name}"):
        known = {entry.path: entry for entry in load_index(file, about)}
        entries: dict[str, Entry] = {}
        for entry in found:
            old = known.get(entry.path)
            if old is not None and (old.size, old.mtime) == (entry.size, entry.mtime):
                same = old.label == entry.label
                entries[entry.path] = old if same else old._replace(label=entry.label)
        fresh = [entry for entry in found if entry.path not in entries]
        if fresh:
            try:
                for entry in verify_all([(lambda entry: root / entry.path, fresh)], name):
                    entries[entry.path] = entry
            finally:
                # An interrupted build keeps the old entries too.
                kept = entries if len(entries) == len(found) else {**known, **entries}
                if not save_index(file, about, list(kept.values())):
                    log.warning(
                        "%s cannot be written: the index of %s is not kept and is made again "
                        "next time",
                        file,
                        name,
                    )
    return [entries[entry.path] for entry in found]


def scan_folder(root: Path, classes: list[str]) -> tuple[list[Entry], Counter[str]]:
    """Return the entries of a folder, sorted by path and not verified, and counts of other files
    by extension. Writes nothing. The class "" is the folder itself.

    Raises DataError when a class has no images or a folder cannot be listed.
    """
    found: list[Entry] = []
    others: Counter[str] = Counter()
    with threads() as pool:
        for scanned, extensions in pool.map(lambda label: _scan_class(root, label), classes):
            found += scanned
            others += extensions
    return sorted(found, key=lambda entry: entry.path), others


def index_file(path: Path) -> Path:
    """Return the path of the index of a resolved folder or shard."""
    return cache_dir() / "index" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.csv"


def load_index(file: Path, about: str) -> list[Entry]:
    """Return the entries of an index file.

    Empty when the file is absent, about something else, of another version or damaged.
    """
    try:
        head, _, body = file.read_bytes().partition(b"\n")
    except OSError:
        return []
    checksum = hashlib.sha256(body).hexdigest().encode()
    if not head.startswith(_FORMAT.encode()) or checksum not in head:
        log.warning("%s is damaged or of another version: it is made again", file)
        return []
    if not head.endswith(_encoded(f", {about}")):
        return []
    rows = csv.reader(io.StringIO(body.decode("utf-8", "surrogateescape"), newline=""))
    try:
        next(rows)
        entries = []
        for path, label, *numbers, format, ok, error in rows:
            offset, size, mtime, width, height = map(int, numbers)
            fields = (path, label, offset, size, mtime, width, height, format, ok == "1", error)
            entries.append(Entry(*fields))
        return entries
    except (ValueError, StopIteration, csv.Error):
        log.warning("%s is no index: it is made again", file)
        return []


def save_index(file: Path, about: str, entries: list[Entry]) -> bool:
    """Write an index file whole or not at all. Return False when the cache cannot be written."""
    text = io.StringIO(newline="")
    # Quoted, since names may hold line ends of any kind.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(Entry._fields)
    for entry in entries:
        writer.writerow(int(value) if isinstance(value, bool) else value for value in entry)
    body = text.getvalue().encode("utf-8", "surrogateescape")
    checksum = hashlib.sha256(body).hexdigest()
    head = _encoded(f"{_FORMAT}, sha256 of what follows {checksum}, {about}")
    return write_cache(file, head + b"\n" + body)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def verify_all(parts: Sequence[Part], name: str) -> Iterator[Entry]:
    """Yield the entries of all parts in order, each decoded once if it is still `PENDING`.

    Logs the number of images; a terminal shows a progress bar.
    """
    total = sum(len(entries) for _, entries in parts)
    if not total:
        return
    log.info("indexing %s: %s images to verify", name, f"{total:,}")
    tasks = [
        (content, entries[i : i + _CHUNK])
        for content, entries in parts
        for i in range(0, len(entries), _CHUNK)
    ]
    # PIL decodes without the GIL, so threads suffice.
    with threads() as pool, progress_bar(total, f"indexing {name}") as advance:
        for chunk in pool.map(lambda task: [_verify(entry, task[0]) for entry in task[1]], tasks):
            yield from chunk
            advance(len(chunk))


def _verify(entry: Entry, content: Callable[[Entry], Path | io.BytesIO]) -> Entry:
    """Decode the file.

    JPEGs are decoded at an eighth of the size: this still reads the whole stream, so damage shows,
    in a fraction of the time.
    """
    if entry.error != PENDING:
        return entry
    try:
        with open_image(content(entry)) as image:
            width, height = image.size
            format = image_format(image)
            image.draft("L", (1, 1))
            image.load()
            if is_deep(image):
                to_rgb(image)
                if 255 < np.asarray(image).max(initial=0) < 4096:
                    format = f"{format} {FEW_BITS}"
    # PIL raises many types, see decode.read_rgb.
    except Exception as error:
        return entry._replace(ok=False, error=reason(error))
    return entry._replace(width=width, height=height, format=format, ok=True, error="")


class Files(NamedTuple):
    """Fields of an index that only sources of files have."""

    num_bytes: np.ndarray  # int64 [N]
    formats: np.ndarray  # uint8 [N], positions in `format_names`
    format_names: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]  # printable name and reason, where `ok` is False

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
    """Warn of unreadable images, given as (name, reason).

    Raises DataError when their share exceeds `max_bad_share` or all are unreadable.
    """
    if not bad:
        return
    listed = some(f"{name} ({why})" for name, why in bad)
    text = f"{source}: {len(bad):,} of {total:,} images cannot be read: {listed}"
    if len(bad) > max_bad_share * total or len(bad) == total:
        raise DataError(
            f"{text}; fix or remove them, or raise data.max_bad_share ({max_bad_share:g})"
        )
    log.warning("%s; each is replaced by the next valid image", text)


def _report_left_out(folder: Path, others: Counter[str], stray: bool) -> None:
    """Warn of files in a data set that are not read.

    others: counts by extension. stray: images next to the class folders are not read either.
    """
    count = stray and sum(
        item.name.lower().endswith(EXTENSIONS) and not item.name.startswith(".") and item.is_file()
        for item in os.scandir(folder)
    )
    if count:
        log.warning(
            "%s images lie in %s itself and are not read: move them into class folders",
            f"{count:,}",
            folder,
        )
    if others:
        listed = some(f"{extension} {count:,}" for extension, count in others.most_common())
        log.warning(
            "%s files in %s are not read, as their names do not end in %s: %s",
            f"{others.total():,}",
            folder,
            " ".join(EXTENSIONS),
            listed,
        )


def report_few_bits(source: str, files: Files) -> None:
    """Warn of 16-bit grey images that decode to nearly black."""
    few = [i for i, name in enumerate(files.format_names) if name.endswith(FEW_BITS)]
    count = int(np.isin(files.formats, few).sum())
    if count:
        log.warning(
            "%s grey images in %s are 16-bit files that use at most 12 bits, so they are nearly "
            "black: scale their values to 16 bits",
            f"{count:,}",
            source,
        )


def _scan_class(root: Path, label: str) -> tuple[list[Entry], Counter[str]]:
    """Return the entries of one class, not yet verified, and counts of other files by extension."""
    entries: list[Entry] = []
    others: Counter[str] = Counter()
    try:
        _scan(root, label, label, (), entries, others)
    except OSError as error:
        raise DataError(
            f"{root / label}: cannot be listed: {error.strerror} (--data-dir)"
        ) from error
    if not entries and not label:
        raise DataError(f"{root}: no images in it ({' '.join(EXTENSIONS)})")
    if not entries:
        raise DataError(
            f"class folder {root / label} holds no images ({' '.join(EXTENSIONS)}); "
            "fill it, or leave the class out (--class-map)"
        )
    return entries, others


def _scan(
    root: Path,
    relative: str,
    label: str,
    above: tuple[tuple[int, int], ...],
    entries: list[Entry],
    others: Counter[str],
) -> None:
    """Collect images below `relative`, through symbolic links.

    `above` are the parent folders (device, inode), which end loops of links.
    """
    here = os.stat(root / relative)
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    with os.scandir(root / relative) as listing:
        for item in listing:
            # Among hidden files are the ._NAME.jpg that macOS leaves on other file systems.
            if item.name.startswith("."):
                continue
            path = f"{relative}/{item.name}" if relative else item.name
            if item.is_dir():
                _scan(root, path, label, (*above, identity), entries, others)
            elif item.name.lower().endswith(EXTENSIONS):
                try:
                    stat = item.stat()
                    size, mtime = stat.st_size, stat.st_mtime_ns
                except OSError:
                    # A broken link is a bad file, not an absent one.
                    size, mtime = 0, 0
                entries.append(Entry(path, label, 0, size, mtime, 0, 0, "", False, PENDING))
            else:
                others[shown(os.path.splitext(item.name)[1].lower()) or "no extension"] += 1
