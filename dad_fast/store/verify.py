"""Checking a store, byte for byte, and joining parts that were written on different machines."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dad_fast.errors import DataError
from dad_fast.files import disk_error
from dad_fast.store.files import LOCK, PART, Busy, locked, write_whole
from dad_fast.store.layout import INDEX, broken_rows, shard_file
from dad_fast.store.manifest import MANIFEST, Manifest
from dad_fast.store.state import (
    SUMS,
    expected_size,
    file_sizes,
    finished_shards,
    missing_shards,
    recorded_sums,
    some,
    sums_text,
)
from dad_fast.store.writer import StoreWriter

_CHUNK = 1 << 24
_NAMED = 20  # rows of a shard that are named


def verify(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read every byte of a store, finished or not. Returns what is wrong, one line each with the mend where there is one; [] = nothing.

    progress: called with bytes done and bytes in all. Raises DataError when the manifest itself cannot be used.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    sizes = file_sizes(folder)
    problems = _wrong_files(manifest, sizes)
    whole = finished_shards(folder, manifest)
    num_bytes = [sum(sizes[shard_file(shard, kind)] for kind in manifest.files) for shard in whole]
    done, total = 0, sum(num_bytes)
    for shard, size in zip(whole, num_bytes, strict=True):
        problems += _wrong_shard(folder, manifest, shard)
        done += size
        if progress:
            progress(done, total)
    if not manifest.complete:
        missing = missing_shards(folder, manifest)
        what = (
            f"shards {some(missing)} of {manifest.geometry.num_shards:,} are missing"
            if missing
            else "all shards are there, unfinished"
        )
        problems.append(f"{what}; run the command that made the store again")
    return problems


def _wrong_files(manifest: Manifest, sizes: dict[str, int]) -> list[str]:
    """Files that are missing, of the wrong size, or not the store's."""
    problems, known = [], {MANIFEST}
    for shard in range(manifest.geometry.num_shards):
        begun = manifest.complete or shard_file(shard, SUMS) in sizes
        if not manifest.complete:
            known |= {
                shard_file(shard, SUMS),
                shard_file(shard, SUMS) + PART,
                shard_file(shard, LOCK[1:]),
                MANIFEST + LOCK,
            }
        for kind in manifest.files:
            name, wanted = shard_file(shard, kind), expected_size(manifest, shard, kind)
            known |= {name} if manifest.complete else {name, name + PART}
            if begun and sizes.get(name, -1) < 0:
                problems.append(f"{name}: missing; run the command that made the store again")
            elif begun and wanted not in (None, sizes[name]):
                problems.append(
                    f"{name}: {sizes[name]:,} bytes, not {wanted:,}; run the command that made the store again"
                )
    problems += [
        f"{name}: does not belong to the store; remove it" for name in sorted(set(sizes) - known)
    ]
    return problems


def _wrong_shard(folder: Path, manifest: Manifest, shard: int) -> list[str]:
    """What the checksums of a shard, whose files have their sizes, say."""
    sums = recorded_sums(folder, manifest, shard)
    assert sums is not None
    problems = []
    for kind in manifest.files:
        if _sha256(folder / shard_file(shard, kind)) != sums[kind]:
            mend = "remove the shard's files and run the command that made the store again"
            problems.append(
                f"{shard_file(shard, kind)}: not the bytes that were written (SHA-256); {mend}"
            )
    view, start, stop = manifest.geometry.place(shard)
    index = np.memmap(folder / shard_file(shard, "index"), INDEX, "r").view(np.ndarray)
    data = (
        np.memmap(folder / shard_file(shard, "data"), np.uint8, "r")
        .reshape(stop - start, -1)
        .view(np.ndarray)
    )
    bad = broken_rows(index, data, view, start)
    for i in np.flatnonzero((index["label"] < 0) | (index["label"] >= manifest.num_classes)):
        bad.setdefault(
            start + int(i),
            f"its label {index['label'][i]} is none of the {manifest.num_classes} classes",
        )
    if "images" in manifest.files:
        bad |= _wrong_images(folder / shard_file(shard, "images"), index, start, bad)
    problems += [
        f"{shard_file(shard, 'index')}: row {row} of view {view}: {why}"
        for row, why in sorted(bad.items())[:_NAMED]
    ]
    if len(bad) > _NAMED:
        problems.append(
            f"{shard_file(shard, 'index')}: {len(bad) - _NAMED:,} more rows of view {view}"
        )
    return problems


def _wrong_images(
    path: Path, index: np.ndarray, start: int, known: Mapping[int, str]
) -> dict[int, str]:
    """Rows that are not `known` as bad and whose image is."""
    bad: dict[int, str] = {}
    size, end = path.stat().st_size, 0  # of the image before; -1 where only a damaged record knows
    with open(path, "rb") as file:
        for row, record in enumerate(index, start):
            if row in known:
                end = -1
                continue
            first, length = int(record["image_start"]), int(record["image_bytes"])
            file.seek(min(first, size))
            if (
                end not in (-1, first)
                or length > size
                or zlib.crc32(file.read(length)) != record["image_crc"]
            ):
                bad[row] = "its image is damaged"
            end = first + length
    if end not in (-1, size):
        bad.setdefault(
            start + len(index) - 1, f"the images end at byte {end:,}, the file at {size:,}"
        )
    return bad


def merge(
    sources: Sequence[str | Path],
    into: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Bring the finished shards of parts of one store together in `into`, new or one of the parts. Shards are linked where the file system
    can, else copied; their checksums are checked on the way.

    Returns the shards that are still missing; [] when the store is complete.

    Raises DataError when parts were made with other settings, hold different versions of a shard, or one that is damaged.
    """
    folders = [Path(source) for source in sources]
    manifests = [Manifest.load(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        if differences := manifests[0].differences(manifest, str(folders[0]), str(folder)):
            raise DataError(
                f"{folder}: not a part of the same store: {'; '.join(differences[:12])}"
            )
    writer = StoreWriter.open(into, manifests[0], resume=True)
    into = writer.folder
    found: dict[int, tuple[Path, dict[str, str]]] = {}
    for folder, manifest in zip([into, *folders], [writer.manifest, *manifests], strict=True):
        for shard in finished_shards(folder, manifest):
            sums = recorded_sums(folder, manifest, shard)
            assert sums is not None
            first = found.setdefault(shard, (folder, sums))
            if first[1] != sums:
                raise DataError(
                    f"shard {shard} is not the same in {first[0]} and in {folder}; remove it from one of them (were they computed alike?)"
                )
    for number, (shard, (folder, sums)) in enumerate(sorted(found.items()), 1):
        if folder != into:
            try:
                with locked(into / shard_file(shard, LOCK[1:])):
                    _bring(folder, into, shard, sums)
            except Busy as error:
                raise DataError(
                    f"{into}: another process is writing shard {shard}; wait for it, or stop it"
                ) from error
        if progress:
            progress(number, len(found))
    return writer.finish()


def _bring(folder: Path, into: Path, shard: int, sums: dict[str, str]) -> None:
    for kind, wanted in sums.items():
        source, target = folder / shard_file(shard, kind), into / shard_file(shard, kind)
        if _sha256(source) != wanted:
            raise DataError(
                f"{source}: not the bytes that were written (SHA-256); dad-fast store verify {folder} says more"
            )
        part = target.with_name(target.name + PART)
        part.unlink(missing_ok=True)
        try:
            try:
                os.link(source, part)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, part)
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise disk_error(error, target) from error
    write_whole(into / shard_file(shard, SUMS), sums_text(shard, sums))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
