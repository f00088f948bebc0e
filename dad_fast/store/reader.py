"""Reading a store: memory-mapped, in any order, from any number of processes.

    store = AdversarialStore(folder)
    rows = store.rows(source)                  # int64 [N]: where each of the source's samples lies
    codes = store.codes(rows[batch], view=0)   # uint8 [B, code_bytes], packed

Opening checks that every shard is there with its size; `dad-fast store verify` checks the content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dad_fast.data.sources.base import Source
from dad_fast.errors import DataError, UsageError
from dad_fast.store.files import map_file
from dad_fast.store.images import decode_image, on_all_cores
from dad_fast.store.layout import INDEX, KEPT, READABLE, hash_keys, shard_file
from dad_fast.store.manifest import Manifest
from dad_fast.store.state import file_sizes, has_files, some


class Store:
    """What both kinds of stores share. Holds no open files until it is read, so that it can be pickled to loader processes.

    Methods take `rows`, int [n] in any order, and a `view`; they return new arrays with n rows. They raise DataError for a shard that has
    vanished, IndexError for rows or views that the store does not have.
    """

    kind = ""

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError when `folder` is no complete store of this kind, naming what is missing."""
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        if self.manifest.kind != self.kind:
            raise DataError(
                f"{folder}: a store of kind {self.manifest.kind}, where one of kind {self.kind} is needed"
            )
        sizes = file_sizes(self.folder)
        geometry = self.manifest.geometry
        missing = [
            shard
            for shard in range(geometry.num_shards)
            if not has_files(self.manifest, shard, sizes)
        ]
        if missing or not self.manifest.complete:
            what = (
                f"shards {some(missing)} of {geometry.num_shards:,} are missing"
                if missing
                else "it was never finished"
            )
            raise DataError(
                f"{folder}: {what}; run the command that made it again, or merge its parts"
            )
        self._geometry = geometry
        self._data = self.manifest.data_dtype
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Samples of a view."""
        return self.manifest.num_samples

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    @property
    def checksum(self) -> str:
        """SHA-256 that stands for the whole store."""
        return self.manifest.checksum

    def rows(self, wanted: Source | Iterable[str], view: int = 0) -> np.ndarray:
        """int64 [N]: the rows of the samples with these keys. A view may hold the samples in an order of its own.

        Raises DataError that names keys which the store lacks or has twice.
        """
        keys: Sequence[str] = wanted.keys if hasattr(wanted, "keys") else list(wanted)
        ours = self.keys(np.arange(len(self)), view).view("V16").ravel()
        theirs = hash_keys(keys).view("V16").ravel()
        if len(ours) == len(theirs) and np.array_equal(ours, theirs):
            return np.arange(len(ours))
        order = np.argsort(ours, kind="stable")
        places = np.searchsorted(ours, theirs, sorter=order)
        found = order[np.minimum(places, len(order) - 1)]
        if (absent := ours[found] != theirs).any():
            names = [keys[int(i)] for i in np.flatnonzero(absent)]
            what = f"{len(names):,} of {len(keys):,} samples are not in the store: {some(names, 3)}"
            raise DataError(f"{self.folder}: {what}; was it made from this data?")
        after = order[np.minimum(places + 1, len(order) - 1)]
        if (twice := (ours[after] == theirs) & (after != found)).any():
            raise DataError(
                f"{self.folder}: {keys[int(twice.argmax())]} is twice in view {view}; it cannot be joined by keys"
            )
        return found

    def keys(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """uint8 [n, 16]: the first half of the SHA-256 of each sample's key."""
        return np.ascontiguousarray(self._index(rows, view)["key"])

    def labels(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """int64 [n], in the order of `manifest.classes`."""
        return self._index(rows, view)["label"].astype(np.int64)

    def readable(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """bool [n]; False where the image could not be read when the store was made, and nothing else of it is stored."""
        return self._index(rows, view)["flags"] & READABLE != 0

    def outputs(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """The teacher's logits minus their maximum, float16 [n, C]; from `topk` as outputs.py says, for its temperature."""
        first, last = (
            ("max_logit", "logits") if self.manifest.outputs_form.k else ("logits", "logits")
        )
        return self.manifest.outputs_form.decode(
            self._fields(rows, view, first, last), self.manifest.num_classes
        )

    def max_logits(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """float32 [n]: what was taken from the logits."""
        return np.ascontiguousarray(self._fields(rows, view, "max_logit", "max_logit")["max_logit"])

    def _index(self, rows: np.ndarray, view: int) -> np.ndarray:
        """INDEX [n]."""
        return self._gather("index", rows, view, 0, INDEX.itemsize).view(INDEX).ravel()

    def _fields(self, rows: np.ndarray, view: int, first: str, last: str) -> np.ndarray:
        """Records [n] of the fields from `first` to `last` of .data."""
        assert self._data.fields is not None and self._data.names is not None
        begin = self._data.fields[first][1]
        end = self._data.fields[last][1] + self._data[last].itemsize
        names = self._data.names[self._data.names.index(first) : self._data.names.index(last) + 1]
        part = np.dtype([(name, self._data[name].base, self._data[name].shape) for name in names])
        return self._gather("data", rows, view, begin, end).view(part).ravel()

    def _gather(
        self,
        kind: str,
        rows: np.ndarray,
        view: int,
        begin: int,
        end: int,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """uint8 [n, end - begin]: these bytes of the records of `rows`."""
        shards, places = self._locate(rows, view)
        if out is None:
            out = np.empty((len(shards), end - begin), np.uint8)
        maps = {shard: self._map(kind, shard)[:, begin:end] for shard in set(shards)}
        for i, (shard, place) in enumerate(zip(shards, places, strict=True)):
            out[i] = maps[shard][place]
        return out

    def _locate(self, rows: np.ndarray, view: int) -> tuple[list[int], list[int]]:
        """Shard, and place in it, of each row."""
        rows = np.asarray(rows)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(
                f"{self.folder}: has the rows 0 to {len(self) - 1}, not {rows.min()} to {rows.max()}"
            )
        if not 0 <= view < self.num_views:
            raise IndexError(f"{self.folder}: has the views 0 to {self.num_views - 1}, not {view}")
        shards, places = np.divmod(rows, self._geometry.rows_per_shard)
        return (shards + view * self._geometry.shards_per_view).tolist(), places.tolist()

    def _map(self, kind: str, shard: int) -> np.ndarray:
        """A shard's file: uint8 [records, size], or uint8 [bytes] for encoded images."""
        found = self._maps.get((kind, shard))
        if found is None:
            path = self.folder / shard_file(shard, kind)
            try:
                found = map_file(path)
                if kind != "images" or self.manifest.images == "raw":
                    _, start, stop = self._geometry.place(shard)
                    found = found.reshape(stop - start, self.manifest.bytes_per_sample[kind])
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path}: cannot be read ({error}); see dad-fast store verify {self.folder}"
                ) from error
            self._maps[kind, shard] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


class AdversarialStore(Store):
    """Q(x') of every sample and view, as codes, images or both, and the teacher's outputs on it."""

    kind = "adversarial"

    def codes(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """uint8 [n, code_bytes], packed; `dad_fast.kernels.unpack_codes(codes, manifest.code_bits, manifest.num_codes)`: int64 [n, h * w].

        Raises UsageError when the store has no codes.
        """
        if not self.manifest.code_bytes:
            raise UsageError(
                f"{self.folder}: holds no codes, its discretizer has none; train on its images"
            )
        return self._fields(rows, view, "codes", "codes")["codes"]

    def kept(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """bool [n]: the teacher still says the label of Q(x'), so that the sample counts. False for unreadable samples."""
        return self._index(rows, view)["flags"] & KEPT != 0

    def changed(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """float32 [n]: share of the codes that the attack changed; NaN where it was not measured."""
        return self._index(rows, view)["changed"]

    def images(self, rows: np.ndarray, view: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [n, H, W, 3]; black for unreadable samples. Encoded images are decoded on all cores.

        out: where to put them, C-contiguous, such as page-locked memory; a buffer that is used again halves the time.

        Raises UsageError when the store has no images, DataError when one is damaged.
        """
        manifest = self.manifest
        if manifest.images == "none":
            raise UsageError(
                f"{self.folder}: holds no images, only codes (it was made with --images none)"
            )
        shape = (len(rows), *manifest.image_size, 3)
        if out is None:
            out = np.empty(shape, np.uint8)
        if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype} {list(out.shape)}, not contiguous uint8 {list(shape)}"
            )
        if manifest.images == "raw":
            size = manifest.bytes_per_sample["images"]
            self._gather("images", rows, view, 0, size, out.reshape(len(rows), size))
            return out
        shards, _ = self._locate(rows, view)
        index, files = (
            self._index(rows, view),
            {shard: self._map("images", shard) for shard in set(shards)},
        )

        def decode(i: int) -> None:
            start, length = int(index["image_start"][i]), int(index["image_bytes"][i])
            content = files[shards[i]][start : start + length].tobytes()
            name = f"{self.folder / shard_file(shards[i], 'images')}: image of row {rows[i]}"
            out[i] = decode_image(content, manifest.image_size, name) if length else 0

        on_all_cores(decode, range(len(rows)), manifest.images)
        return out


class TargetStore(Store):
    """The teacher's outputs on augmented, mixed clean views: view v of a sample is what training sees in the epochs e = v mod num_views."""

    kind = "targets"


def open_store(folder: str | Path) -> AdversarialStore | TargetStore:
    """The reader that fits the store's kind."""
    kinds = {store.kind: store for store in (AdversarialStore, TargetStore)}
    return kinds[Manifest.load(folder).kind](folder)
