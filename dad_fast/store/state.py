"""Which shards of a folder are there: a shard counts once its checksums are known and its files have their sizes.

A finished shard lies beside `shard-000000.sha256`, in sha256sum's format, until the store is complete and the manifest holds all checksums.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dad_fast.errors import DataError
from dad_fast.store.layout import shard_file
from dad_fast.store.manifest import Manifest

SUMS = "sha256"
_LINE = re.compile(r"([0-9a-f]{64})  shard-(\d{6})\.([a-z]+)")


def file_sizes(folder: Path) -> dict[str, int]:
    """Name and size of everything in the folder; -1 for what is no plain file."""
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # other processes are at work
                sizes[entry.name] = (
                    entry.stat(follow_symlinks=False).st_size
                    if entry.is_file(follow_symlinks=False)
                    else -1
                )
    return sizes


def expected_size(manifest: Manifest, shard: int, kind: str) -> int | None:
    """Bytes of a finished shard's file; None where only its index knows."""
    if kind == "images" and manifest.images != "raw":
        return None
    _, start, stop = manifest.geometry.place(shard)
    return (stop - start) * manifest.bytes_per_sample[kind]


def sums_text(shard: int, sums: Mapping[str, str]) -> bytes:
    return "".join(f"{sums[kind]}  {shard_file(shard, kind)}\n" for kind in sorted(sums)).encode()


def recorded_sums(folder: Path, manifest: Manifest, shard: int) -> dict[str, str] | None:
    """SHA-256 of a finished shard's files by kind, as recorded; None when it is not finished. The files are not read."""
    try:
        text = (folder / shard_file(shard, SUMS)).read_text("ascii")
    except FileNotFoundError:
        return dict(manifest.shards[shard]) if manifest.complete else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{folder / shard_file(shard, SUMS)}: cannot be read ({error}); delete it, and the shard is made again"
        ) from error
    found = [_LINE.fullmatch(line) for line in text.splitlines()]
    sums = {match[3]: match[1] for match in found if match and int(match[2]) == shard}
    if len(sums) != len(found) or set(sums) != set(manifest.files):
        raise DataError(
            f"{folder / shard_file(shard, SUMS)}: not the checksums of this shard; delete it, and the shard is made again"
        )
    return sums


def has_files(manifest: Manifest, shard: int, sizes: Mapping[str, int]) -> bool:
    """Every file of the shard is there and has the size that the manifest gives it."""
    for kind in manifest.files:
        there = sizes.get(shard_file(shard, kind), -1)
        if there < 0 or expected_size(manifest, shard, kind) not in (None, there):
            return False
    return True


def is_finished(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Of one shard, without a look at the others."""
    sizes = {}
    for kind in (*manifest.files, SUMS):
        with suppress(FileNotFoundError):
            sizes[shard_file(shard, kind)] = (folder / shard_file(shard, kind)).lstat().st_size
    return (manifest.complete or shard_file(shard, SUMS) in sizes) and has_files(
        manifest, shard, sizes
    )


def finished_shards(folder: Path, manifest: Manifest) -> list[int]:
    """The shards that are there, by the sizes of their files."""
    sizes = file_sizes(folder)
    return [
        shard
        for shard in range(manifest.geometry.num_shards)
        if (manifest.complete or shard_file(shard, SUMS) in sizes)
        and has_files(manifest, shard, sizes)
    ]


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    return sorted(set(range(manifest.geometry.num_shards)) - set(finished_shards(folder, manifest)))


def some(items: list[int] | list[str], most: int = 8) -> str:
    """The first few, and how many more."""
    more = len(items) - most
    return ", ".join(map(str, items[:most])) + (f" and {more:,} more" if more > 0 else "")
