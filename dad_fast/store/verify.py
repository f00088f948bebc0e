"""Verification of a store, byte for byte, and merging of parts from different machines."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dad_fast.data.sources.base import UNLABELLED
from dad_fast.errors import DataError
from dad_fast.files import disk_error
from dad_fast.locks import LOCK, Busy, locked
from dad_fast.store.files import PART, write_whole
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
# Bad rows of a shard that get a line each.
_NAMED = 20


_RERUN = "run the command that made the store again"


def verify(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read every byte of a store, finished or not, and return its problems, [] when there are none.

    A problem is one line, with its fix where there is one.

    progress: called with bytes done and bytes in total. Raises DataError when the manifest itself
    cannot be used.
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
        problem = "all shards are there, unfinished"
        missing = missing_shards(folder, manifest)
        if missing:
            problem = f"shards {some(missing)} of {manifest.geometry.num_shards:,} are missing"
        problems.append(f"{problem}; {_RERUN}")
    return problems


def _wrong_files(manifest: Manifest, sizes: dict[str, int]) -> list[str]:
    """Return the files that are missing, of the wrong size, or not the store's."""
    problems = []
    known = {MANIFEST, LOCK}
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
            name = shard_file(shard, kind)
            wanted = expected_size(manifest, shard, kind)
            known |= {name} if manifest.complete else {name, name + PART}
            if begun and sizes.get(name, -1) < 0:
                problems.append(f"{name}: missing; {_RERUN}")
            elif begun and wanted not in (None, sizes[name]):
                problems.append(f"{name}: {sizes[name]:,} bytes, not {wanted:,}; {_RERUN}")
    problems += [
        f"{name}: does not belong to the store; remove it" for name in sorted(set(sizes) - known)
    ]
    return problems


def _wrong_shard(folder: Path, manifest: Manifest, shard: int) -> list[str]:
    """Check the checksums of a shard whose files have their sizes, and return the problems."""
    sums = recorded_sums(folder, manifest, shard)
    assert sums is not None
    problems = []
    for kind in manifest.files:
        name = shard_file(shard, kind)
        if _sha256(folder / name) != sums[kind]:
            problems.append(
                f"{name}: not the bytes that were written (SHA-256); "
                f"remove the shard's files and {_RERUN}"
            )

    view, start, stop = manifest.geometry.place(shard)
    index_name = shard_file(shard, "index")
    index = np.memmap(folder / index_name, INDEX, "r").view(np.ndarray)
    content = np.memmap(folder / shard_file(shard, "data"), np.uint8, "r").view(np.ndarray)
    bad = broken_rows(index, content.reshape(stop - start, -1), view, start)
    labels = index["label"]
    for i in np.flatnonzero((labels < UNLABELLED) | (labels >= manifest.num_classes)):
        label = index["label"][i]
        why = f"its label {label} is none of the {manifest.num_classes} classes"
        bad.setdefault(start + int(i), why)
    if "images" in manifest.files:
        bad |= _wrong_images(folder / shard_file(shard, "images"), index, start, bad)

    problems += [
        f"{index_name}: row {row} of view {view}: {why}"
        for row, why in sorted(bad.items())[:_NAMED]
    ]
    if len(bad) > _NAMED:
        problems.append(f"{index_name}: {len(bad) - _NAMED:,} more rows of view {view}")
    return problems


def _wrong_images(
    path: Path, index: np.ndarray, start: int, known: Mapping[int, str]
) -> dict[int, str]:
    """Return rows with a bad image, except those `known` as bad."""
    bad: dict[int, str] = {}
    size = path.stat().st_size
    # End of the previous image; -1 after a damaged record, which alone knows it.
    end = 0
    with open(path, "rb") as file:
        for row, record in enumerate(index, start):
            if row in known:
                end = -1
                continue
            first, length = int(record["image_start"]), int(record["image_bytes"])
            file.seek(min(first, size))
            misplaced = end not in (-1, first) or length > size
            if misplaced or zlib.crc32(file.read(length)) != record["image_crc"]:
                bad[row] = "its image is damaged"
            end = first + length
    if end not in (-1, size):
        last = start + len(index) - 1
        bad.setdefault(last, f"the images end at byte {end:,}, the file at {size:,}")
    return bad


def merge(
    sources: Sequence[str | Path],
    into: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Collect the finished shards of a store's parts in `into`, a new folder or one of the parts.

    Shards are linked where the file system allows it, else copied; their checksums are verified.
    Returns the shards that are still missing, [] when the store is complete.

    Raises DataError when parts were made with different settings, hold different versions of a
    shard, or a damaged one.
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
                    f"shard {shard} is not the same in {first[0]} and in {folder}; "
                    "remove it from one of them (were they computed alike?)"
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
                f"{source}: not the bytes that were written (SHA-256); "
                f"dad-fast store verify {folder} lists the damage"
            )
        part = target.with_name(target.name + PART)
        part.unlink(missing_ok=True)
        try:
            try:
                os.link(source, part)
            except OSError:
                # Another file system, or one without links.
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
