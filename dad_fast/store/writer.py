"""Writer of stores: identical bytes from any number of processes, also after kills at any moment.

    writer = StoreWriter.open(folder, manifest, resume=True)
    for number in writer.shards_to_do(rank, world):
        with writer.shard(number) as shard:
            for block in shard.todo():
                shard.append(StoreRows(...))       # rows block.start … block.stop - 1 of block.view
    missing = writer.finish()                    # [] when all shards are finished, by any process

A shard is written under its own lock into `.part` files, block by block. Reopening checks the
checksums of every record and resumes after the last whole block, so that at most one block is
computed twice.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dad_fast.errors import DataError, NotFinite, UsageError
from dad_fast.files import disk_error, sync
from dad_fast.locks import LOCK, Busy, locked
from dad_fast.store.files import PART, Bytes, Part, write_whole
from dad_fast.store.images import stored_files
from dad_fast.store.layout import (
    INDEX,
    KEPT,
    READABLE,
    RowBlock,
    broken_rows,
    crcs,
    hash_keys,
    seal,
    shard_file,
)
from dad_fast.store.manifest import MANIFEST, Manifest
from dad_fast.store.state import (
    SUMS,
    finished_shards,
    is_finished,
    missing_shards,
    recorded_sums,
    sums_text,
)

# Work that a power cut may lose; a killed process loses nothing that was written.
SYNC_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class StoreRows:
    """Rows of a block, in order, without padding. Arrays or CPU tensors.

    keys: [n] of the samples, from the source; labels: int [n]
    outputs: float [n, C], the teacher's logits
    readable: bool [n], False for unreadable images: only their key and label are stored; None = all
        are readable
    kept: bool [n], the teacher still predicts the label; changed: float [n], share of codes
        changed; None if not measured
    codes: uint8 [n, code_bytes], packed; None when the manifest has none
    images: uint8 [n, H, W, 3], or n encoded files; None when the manifest has none
    """

    keys: Sequence[str]
    labels: np.ndarray
    outputs: np.ndarray
    readable: np.ndarray | None = None
    kept: np.ndarray | None = None
    changed: np.ndarray | None = None
    codes: np.ndarray | None = None
    images: np.ndarray | list[Bytes] | None = None


class StoreWriter:
    """A store under construction; `open` makes it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path, manifest: Manifest, resume: bool = False) -> StoreWriter:
        """Begin a store in a new or empty folder or, with `resume`, continue an existing one.

        Of several processes one begins the store and the others resume it.

        Raises:
            UsageError: the folder holds a store already (without `resume`), or other files.
            DataError: the existing store has different settings, which are listed; or the folder
                cannot be written.
        """
        folder = Path(folder)
        if folder.is_file():
            raise UsageError(f"{folder}: is a file; a store needs a folder of its own")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / (MANIFEST + LOCK), wait=True):
                names = {path.name for path in folder.iterdir()}
                names -= {LOCK, MANIFEST + LOCK, MANIFEST + PART}
                if MANIFEST not in names:
                    if names:
                        raise UsageError(
                            f"{folder}: holds other files, such as {min(names)}; "
                            "a store needs a folder of its own"
                        )
                    write_whole(folder / MANIFEST, manifest.with_shards(()).to_json())
                    return cls(folder, manifest.with_shards(()))
                if not resume:
                    raise UsageError(f"{folder}: there is a store already; name another folder")
        except OSError as error:
            raise disk_error(error, folder) from error

        found = Manifest.load(folder)
        differences = found.differences(manifest)
        if differences:
            raise DataError(
                f"{folder}: made with other settings: {'; '.join(differences[:12])}; "
                "use those, or name another folder"
            )
        return cls(folder, found)

    def shards_to_do(self, rank: int = 0, world: int = 1) -> list[int]:
        """Return this process's unfinished shards. `world` may differ from that of earlier runs."""
        finished = set(finished_shards(self.folder, self.manifest))
        shards = range(rank, self.manifest.geometry.num_shards, world)
        return [shard for shard in shards if shard not in finished]

    def blocks_to_do(self, number: int) -> list[RowBlock]:
        """Return the missing blocks of a shard, for loaders that need all numbers in advance.

        Checks the blocks of an earlier attempt, and finishes the shard when none is missing.
        """
        files = [self.folder / shard_file(number, kind) for kind in self.manifest.files]
        files += [path.with_name(path.name + PART) for path in files]
        if not any(path.exists() for path in files):
            return self.manifest.geometry.blocks(number)
        with self.shard(number) as shard:
            return shard.todo()

    @contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter]:
        """Write one shard.

        Leaving the context after the last block finishes the shard; leaving earlier keeps its whole
        blocks for later. Raises DataError when another process is writing it or the disk is full.
        """
        try:
            with locked(self.folder / shard_file(number, LOCK[1:])):
                with ShardWriter(self.folder, self.manifest, number) as shard:
                    yield shard
        except Busy as error:
            raise DataError(
                f"{self.folder}: another process is writing shard {number}; wait for it, or stop it"
            ) from error

    def finish(self) -> list[int]:
        """Complete the store when all shards are finished. Any process may call this, repeatedly.

        Returns the shards that are missing; [] when the store is complete.
        """
        with locked(self.folder / (MANIFEST + LOCK), wait=True):
            manifest = Manifest.load(self.folder)
            missing = missing_shards(self.folder, manifest)
            shards = range(manifest.geometry.num_shards)
            # Read even when shards are missing: a damaged file of checksums is reported at once.
            sums = [
                recorded_sums(self.folder, manifest, shard)
                for shard in shards
                if shard not in missing
            ]
            if missing:
                return missing

            complete = manifest.with_shards(tuple(entry for entry in sums if entry))
            if complete.checksum != manifest.checksum:
                write_whole(self.folder / MANIFEST, complete.to_json())
            for shard in shards:
                (self.folder / shard_file(shard, SUMS)).unlink(missing_ok=True)
            # Locks of processes that were killed after their shard's last byte.
            for path in self.folder.glob("shard-*.lock"):
                with suppress(Busy), locked(path):
                    pass
            self.manifest = complete
            return []


class ShardWriter:
    """One locked shard, of which `next_block` blocks are written."""

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self.folder, self.manifest, self.number = folder, manifest, number
        self.blocks = manifest.geometry.blocks(number)
        # The manifest is read again: another process may have completed the store, which removes
        # the files of checksums.
        self.finished = is_finished(folder, manifest, number)
        self.finished = self.finished or is_finished(folder, Manifest.load(folder), number)
        self.next_block = len(self.blocks) if self.finished else 0
        self._files: dict[str, Part] = {}
        self._synced = time.monotonic()

    def __enter__(self) -> ShardWriter:
        if not self.finished:
            try:
                with ExitStack() as opened:
                    for kind in self.manifest.files:
                        self._files[kind] = Part(self.folder / shard_file(self.number, kind))
                        opened.callback(self._files[kind].close)
                    self._recover()
                    opened.pop_all()
            except OSError as error:
                raise disk_error(error, self.folder / shard_file(self.number, "data")) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None and not self.finished and self.next_block == len(self.blocks):
                self._commit()
        except OSError as error:
            raise disk_error(error, self.folder / shard_file(self.number, "data")) from error
        finally:
            for part in self._files.values():
                part.close()

    def todo(self) -> list[RowBlock]:
        """Return the blocks to append, in order."""
        return self.blocks[self.next_block :]

    def append(self, records: StoreRows) -> None:
        """Write the next block. After an error the shard ends with the block before it.

        Raises NotFinite for outputs that are not finite, DataError when the disk is full,
        ValueError for arrays of another shape.
        """
        block = self.blocks[self.next_block]
        index, data, images = self._encode(block, records)
        content: dict[str, list[Bytes]] = {
            "index": [index.tobytes()],
            "data": [data.tobytes()],
            "images": images,
        }
        try:
            for kind, part in self._files.items():
                for piece in content[kind]:
                    part.write(piece)
        except OSError as error:
            for part in self._files.values():
                # The disk may refuse this too; reopening the part cuts off an incomplete block.
                with suppress(OSError):
                    part.undo()
            raise disk_error(error, self.folder / shard_file(self.number, "data")) from error
        for part in self._files.values():
            part.accept()
        self.next_block += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            for part in self._files.values():
                os.fsync(part.handle)
            self._synced = time.monotonic()

    def _encode(
        self, block: RowBlock, records: StoreRows
    ) -> tuple[np.ndarray, np.ndarray, list[Bytes]]:
        """Return INDEX [n], uint8 [n, size], and the images' bytes."""
        manifest, num = self.manifest, len(block)
        readable = np.ones(num, bool)
        if records.readable is not None:
            readable = _array(records.readable, (num,), "readable").astype(bool)
        outputs = _array(records.outputs, (num, manifest.num_classes), "outputs").astype(np.float32)
        labels = _array(records.labels, (num,), "labels")
        if len(records.keys) != num:
            raise ValueError(f"{len(records.keys)} keys for a block of {num}")
        bad = readable & ~np.isfinite(outputs).all(axis=1)
        if bad.any():
            name = records.keys[int(bad.argmax())]
            raise NotFinite(
                f"the teacher's outputs on {name} are not finite; "
                "look at that image, or try --amp off"
            )

        data = np.zeros(num, manifest.data_dtype)
        manifest.outputs_form.encode(np.where(readable[:, None], outputs, 0), data)
        if manifest.code_bytes:
            data["codes"] = _array(records.codes, (num, manifest.code_bytes), "codes")
        raw = data.view(np.uint8).reshape(num, -1)
        raw[~readable] = 0

        index = np.zeros(num, INDEX)
        index["key"] = hash_keys(records.keys)
        index["row"] = np.arange(block.start, block.stop)
        index["label"], index["view"] = labels, block.view
        index["flags"] = READABLE * readable
        if records.kept is not None:
            kept = readable & _array(records.kept, (num,), "kept").astype(bool)
            index["flags"] |= (KEPT * kept).astype(np.uint16)
        index["changed"] = np.nan
        if records.changed is not None:
            changed = _array(records.changed, (num,), "changed")
            index["changed"] = np.where(readable, changed, np.nan)

        images: list[Bytes] = []
        if manifest.images != "none":
            given = records.images
            if not isinstance(given, list):
                given = _array(given, (num, *manifest.image_size, 3), "images")
            images = stored_files(given, manifest.images, readable)
            sizes = [len(content) for content in images]
            index["image_bytes"] = sizes
            index["image_start"] = self._files["images"].size + np.cumsum([0, *sizes])[:-1]
            index["image_crc"] = [zlib.crc32(content) for content in images]
        index["data_crc"] = crcs(raw)
        seal(index)
        return index, raw, images

    def _recover(self) -> None:
        """Keep an earlier attempt's whole blocks with correct checksums, and cut off the rest."""
        for block in self.blocks:
            index_size = len(block) * INDEX.itemsize
            data_size = len(block) * self.manifest.bytes_per_sample["data"]
            index = np.frombuffer(self._files["index"].read(index_size), np.uint8)
            data = np.frombuffer(self._files["data"].read(data_size), np.uint8)
            if len(index) < index_size or len(data) < data_size:
                break
            records = index.view(INDEX)
            if broken_rows(records, data.reshape(len(block), -1), block.view, block.start):
                break
            if "images" in self._files and not self._has_images(records):
                break
            for part in self._files.values():
                part.accept()
            self.next_block += 1
        for part in self._files.values():
            part.undo()

    def _has_images(self, records: np.ndarray) -> bool:
        part = self._files["images"]
        limit = self.manifest.bytes_per_sample["images"]
        start = part.size
        for record in records:
            length = int(record["image_bytes"])
            if record["image_start"] != start or length > 2 * limit + 1024:
                return False
            content = part.read(length)
            if len(content) < length or zlib.crc32(content) != record["image_crc"]:
                return False
            start += length
        return True

    def _commit(self) -> None:
        """Rename the files, then write the checksums that mark the shard as finished."""
        for part in self._files.values():
            os.fsync(part.handle)
        for part in self._files.values():
            os.replace(part.path, part.final)
        sync(self.folder)
        sums = {kind: part.sha256.hexdigest() for kind, part in self._files.items()}
        write_whole(self.folder / shard_file(self.number, SUMS), sums_text(self.number, sums))
        self.finished = True


def _array(values: np.ndarray | None, shape: tuple[int, ...], name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"{name} have the shape {list(array.shape)}, not {list(shape)}")
    return array
