"""Samples of WebDataset shards: members of a tar that share a key, verified once and cached.

A key is a member's path up to the first dot of its file name; the rest, in lower case, is its kind:
`n01/5.JPEG` and `n01/5.cls` are one sample. A sample needs one image and a class number, in `.cls`
or as `label` in `.json`. Members of a sample need not be neighbours. An index file belongs to one
shard and is made again when the shard's size or mtime changes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from dad_fast.cache import cache_dir, one_at_a_time
from dad_fast.data.sources.decode import EXTENSIONS
from dad_fast.data.sources.index import (
    PENDING,
    Entry,
    index_file,
    load_index,
    save_index,
    verify_all,
)
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.pool import threads
from dad_fast.data.sources.tar_members import Kind, Member, read_members
from dad_fast.errors import DataError

log = logging.getLogger("dad_fast.data")

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
# WebDataset reserves such names.
_META = re.compile(r"__[^/]*__(?:$|/)")
_IMAGES = {extension[1:] for extension in EXTENSIONS}
_LABELS = ("cls", "json")
# Largest members, in bytes.
_LARGEST = {"image": 1 << 30, "cls": 64, "json": 1 << 24}
# A quarter of the usual limit of a process.
_OPEN_FILES = 256
_WHY_NOT: dict[Kind, str] = {
    "link": "a link, which is not followed",
    "special": "no regular file",
    "sparse": "stored as a sparse file, which is not read",
    "cut": "the shard ends within it",
}


class Shard(NamedTuple):
    """State of a tar at indexing; `mtime` is in nanoseconds."""

    path: str
    size: int
    mtime: int


class _Open:
    """An open shard. It closes with its last reference, so the cache below may drop it in use."""

    def __init__(self, shard: Shard) -> None:
        self.descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self.descriptor)


# pread has no position, so threads and forked processes may share these.
_open_shard = lru_cache(maxsize=_OPEN_FILES)(_Open)


def read_bytes(shard: Shard, offset: int, size: int) -> bytes:
    """Read `size` bytes of a shard from `offset`.

    Raises OSError when they cannot be read or the shard has changed.
    """
    opened = _open_shard(shard)
    stat = os.fstat(opened.descriptor)
    if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime):
        raise OSError("the shard has changed since it was indexed")
    content = os.pread(opened.descriptor, size, offset)
    if len(content) != size:
        raise OSError("the shard ends within it")
    return content


def build_tar_index(base: Path, names: Sequence[str]) -> tuple[list[Shard], list[list[Entry]]]:
    """Return the shards `names` below `base` and the verified entries of each, in their order.

    Raises DataError when a shard is missing, damaged, compressed or ambiguous.
    """
    paths = [base / name for name in names]
    missing = [shown(str(path)) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(paths):,} shards are missing: {some(missing)} (--data-dir)"
        )
    return build_shard_index(str(base), names, paths, _scan)


def scan_shards(base: Path, names: Sequence[str]) -> list[Entry]:
    """Return the entries of shards from their indexes or their headers. Writes nothing.

    Raises DataError when a shard is missing, damaged or compressed.
    """
    entries: list[Entry] = []
    for name in names:
        try:
            shard = state_of(base / name)
            known = load_index(index_file(Path(shard.path)), _about(shard, ""))
            entries += known or _scan(shard, shown(name))[0]
        except OSError as error:
            why = error.strerror or error
            raise DataError(f"{base / name}: cannot be read: {why} (--data-dir)") from error
    return entries


def read_shards(base: Path, names: Sequence[str]) -> Iterator[tuple[str, BytesIO]]:
    """Yield the name and the content of each image. Raises the errors of `scan_shards`."""
    for name in names:
        entries = scan_shards(base, [name])
        shard = state_of(base / name)
        for entry in entries:
            yield f"{name}:{entry.path}", _content(shard, entry)


# Shard and its name -> its entries, not verified, and why there are none.
Scan = Callable[[Shard, str], tuple[list[Entry], str]]


def build_shard_index(
    where: str, names: Sequence[str], paths: Sequence[Path], scan: Scan, detail: str = ""
) -> tuple[list[Shard], list[list[Entry]]]:
    """Return the shards at `paths` and the verified entries of each, in their order.

    where: the data set, and names: the shards, for messages. detail: of the scan; indexes of
    another one are made again. Raises DataError when a shard cannot be read or none has images.
    """
    first = index_file(paths[0].parent.resolve())
    with one_at_a_time(first, f"indexing {where}"):
        return _build(where, names, paths, scan, detail)


def _build(
    where: str, names: Sequence[str], paths: Sequence[Path], scan: Scan, detail: str
) -> tuple[list[Shard], list[list[Entry]]]:
    try:
        shards = [state_of(path) for path in paths]
        files = [index_file(Path(shard.path)) for shard in shards]
        states = [_about(shard, detail) for shard in shards]
        kept = [load_index(file, state) for file, state in zip(files, states, strict=True)]
        stale = [number for number, entries in enumerate(kept) if not entries]
        if stale:
            log.info("listing the images of %s shards in %s", f"{len(stale):,}", where)
        with threads() as pool:
            scanned = pool.map(lambda number: scan(shards[number], shown(names[number])), stale)
            scans = list(scanned)
    except OSError as error:
        name, why = shown(str(error.filename or where)), error.strerror or error
        raise DataError(f"{name}: cannot be read: {why} (--data-dir)") from error

    found = [entries for entries, _ in scans]
    empty = [problem for _, problem in scans if problem]
    if len(empty) == len(shards):
        raise DataError(empty[0])
    for problem in empty:
        log.warning("%s; this shard is skipped", problem)
    parts = [
        (partial(_content, shards[number]), entries)
        for number, entries in zip(stale, found, strict=True)
    ]
    verified = verify_all(parts, where)
    unkept = 0
    for number, entries in zip(stale, found, strict=True):
        kept[number] = list(islice(verified, len(entries)))
        unkept += not save_index(files[number], states[number], kept[number])
    if unkept:
        log.warning(
            "%s cannot be written: the indexes of %s shards are not kept and are made again "
            "next time",
            cache_dir(),
            unkept,
        )
    return shards, kept


def state_of(path: Path) -> Shard:
    """Return the state of a file. Raises OSError."""
    stat = path.stat()
    return Shard(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def _about(shard: Shard, detail: str) -> str:
    return f"shard {shard.path!r} of {shard.size} bytes, mtime {shard.mtime}{detail}"


def _content(shard: Shard, entry: Entry) -> BytesIO:
    return BytesIO(read_bytes(shard, entry.offset, entry.size))


def _scan(shard: Shard, name: str) -> tuple[list[Entry], str]:
    """Return the entries of one shard, not yet verified, and why there are none.

    Raises DataError for a shard that was cut before its first image.
    """
    opened = _open_shard(shard)
    members, whole = read_members(opened.descriptor, name)
    if not whole:
        log.warning("%s ends without a tar's end mark: it may have been cut short", name)
    samples = _group(members, name)
    odd = [shown(member) for member, key in samples.odd if key not in samples.images]
    if odd:
        log.warning(
            "%s: %s images are in no sample, since a key ends at the first dot of the name: %s",
            name,
            f"{len(odd):,}",
            some(odd),
        )
    if not samples.images:
        matches = [_KEY.fullmatch(member.name) for member in members]
        seen = sorted({shown(match[2]) for match in matches if match})
        what = f"no images in it ({' '.join(EXTENSIONS)} after the first dot of the name)"
        problem = f"{name}: {what}; it has {some(seen) or 'nothing'}"
        if not whole:
            raise DataError(problem)
        return [], problem

    entries = []
    for key, image in samples.images.items():
        entry = Entry(image.name, "", image.offset, image.size, 0, 0, 0, "", False, PENDING)
        why = _WHY_NOT.get(image.kind, "")
        if not why and image.size > _LARGEST["image"]:
            why = f"{image.size:,} bytes are no image"
        if why:
            entries.append(entry._replace(error=why))
            continue
        try:
            entries.append(entry._replace(label=str(_label(shard, samples.labels.get(key, {})))))
        except ValueError as error:
            entries.append(entry._replace(error=str(error)))
    return entries, ""


class _Samples(NamedTuple):
    images: dict[str, Member]  # by key
    labels: dict[str, dict[str, Member]]  # by key, then by kind
    odd: list[tuple[str, str]]  # names with another dot before an image's extension, and their keys


def _group(members: Sequence[Member], shard: str) -> _Samples:
    samples = _Samples({}, {}, [])
    for member in members:
        match = _KEY.fullmatch(member.name)
        if match is None or member.kind == "folder" or _META.match(member.name):
            continue
        key, kind = match[1], match[2].lower()
        if kind in _IMAGES:
            other = samples.images.setdefault(key, member)
        elif kind in _LABELS:
            other = samples.labels.setdefault(key, {}).setdefault(kind, member)
        else:
            if kind.endswith(EXTENSIONS):
                samples.odd.append((member.name, key))
            continue
        if other is not member:
            both = f"{shown(other.name)} and {shown(member.name)}"
            raise DataError(
                f"{shard}: two members for one sample, {both}; "
                "a key needs one image and one label: write the shard again"
            )
    return samples


def _label(shard: Shard, members: dict[str, Member]) -> int:
    """Read the class number of a sample. Raises ValueError with the reason when there is none."""
    kind = next((kind for kind in _LABELS if kind in members), None)
    if kind is None:
        raise ValueError("no .cls and no .json with its label")
    member = members[kind]
    if member.kind != "file" or member.size > _LARGEST[kind]:
        raise ValueError(f"its .{kind} cannot be read")
    content = read_bytes(shard, member.offset, member.size)
    if kind == "cls":
        if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", content):
            raise ValueError(f"its .cls is {shown(repr(content[:20]))}, which is no class number")
        return int(content)
    try:
        value = json.loads(content)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("its .json has no label") from None
    if type(value) is not int or not 0 <= value < 10**9:
        given = shown(repr(value)[:20])
        raise ValueError(f"its .json has the label {given}, which is no class number")
    return value
