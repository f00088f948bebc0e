"""State of a store's shards: a shard is finished once its checksums are recorded.

A finished shard has a file `shard-000000.sha256` next to it, in sha256sum's format, until the store
is complete and the manifest holds all checksums. All files of the shard must have their expected
sizes.
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
    """Return the size of each entry of the folder; -1 for entries that are no plain files."""
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            # Other processes may remove files meanwhile.
            with suppress(FileNotFoundError):
                plain = entry.is_file(follow_symlinks=False)
                sizes[entry.name] = entry.stat(follow_symlinks=False).st_size if plain else -1
    return sizes


def expected_size(manifest: Manifest, shard: int, kind: str) -> int | None:
    """Return the bytes of a finished shard's file; None when only its index records them."""
    if kind == "images" and manifest.images != "raw":
        return None
    _, start, stop = manifest.geometry.place(shard)
    return (stop - start) * manifest.bytes_per_sample[kind]


def sums_text(shard: int, sums: Mapping[str, str]) -> bytes:
    return "".join(f"{sums[kind]}  {shard_file(shard, kind)}\n" for kind in sorted(sums)).encode()


def recorded_sums(folder: Path, manifest: Manifest, shard: int) -> dict[str, str] | None:
    """Return the recorded SHA-256 of a finished shard's files by kind, without reading the files.

    None when the shard is not finished.
    """
    path = folder / shard_file(shard, SUMS)
    try:
        text = path.read_text("ascii")
    except FileNotFoundError:
        return dict(manifest.shards[shard]) if manifest.complete else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); delete it, and the shard is made again"
        ) from error
    found = [_LINE.fullmatch(line) for line in text.splitlines()]
    sums = {match[3]: match[1] for match in found if match and int(match[2]) == shard}
    if len(sums) != len(found) or set(sums) != set(manifest.files):
        raise DataError(
            f"{path}: not the checksums of this shard; delete it, and the shard is made again"
        )
    return sums


def has_files(manifest: Manifest, shard: int, sizes: Mapping[str, int]) -> bool:
    """Return whether every file of the shard exists with the size that the manifest implies."""
    for kind in manifest.files:
        size = sizes.get(shard_file(shard, kind), -1)
        if size < 0 or expected_size(manifest, shard, kind) not in (None, size):
            return False
    return True


def is_finished(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Return whether one shard is finished; reads the sizes of its own files only."""
    sizes = {}
    for kind in (*manifest.files, SUMS):
        name = shard_file(shard, kind)
        with suppress(FileNotFoundError):
            sizes[name] = (folder / name).lstat().st_size
    return _is_finished(manifest, shard, sizes)


def finished_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Return the finished shards, by the sizes of their files."""
    sizes = file_sizes(folder)
    shards = range(manifest.geometry.num_shards)
    return [shard for shard in shards if _is_finished(manifest, shard, sizes)]


def _is_finished(manifest: Manifest, shard: int, sizes: Mapping[str, int]) -> bool:
    recorded = manifest.complete or shard_file(shard, SUMS) in sizes
    return recorded and has_files(manifest, shard, sizes)


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    return sorted(set(range(manifest.geometry.num_shards)) - set(finished_shards(folder, manifest)))


def some(items: list[int] | list[str], most: int = 8) -> str:
    """List the first few items and count the others."""
    more = len(items) - most
    return ", ".join(map(str, items[:most])) + (f" and {more:,} more" if more > 0 else "")
