"""Readers of stores: memory-mapped, in any order, from any number of processes.

    store = AdversarialStore(folder)
    rows = store.rows(source)                  # int64 [N]: row of each of the source's samples
    codes = store.codes(rows[batch], view=0)   # uint8 [B, code_bytes], packed

Opening checks that every shard exists with its size; `dad-fast store verify` checks the content.
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
    """Base of both kinds of stores.

    It holds no open files until it is read, so that it can be pickled to loader processes. Methods
    take `rows`, int [n] in any order, and a `view`; they return new arrays with n rows. They raise
    DataError for a shard that has vanished, IndexError for rows or views that the store does not
    have.
    """

    kind = ""

    def __init__(self, folder: str | Path) -> None:
        """Open a store. Raises DataError when `folder` is no complete store of this kind."""
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        if self.manifest.kind != self.kind:
            raise DataError(
                f"{folder}: a store of kind {self.manifest.kind}; name one of kind {self.kind}"
            )
        sizes = file_sizes(self.folder)
        geometry = self.manifest.geometry
        shards = range(geometry.num_shards)
        missing = [shard for shard in shards if not has_files(self.manifest, shard, sizes)]
        if missing or not self.manifest.complete:
            problem = "it was never finished"
            if missing:
                problem = f"shards {some(missing)} of {geometry.num_shards:,} are missing"
            raise DataError(
                f"{folder}: {problem}; run the command that made it again, or merge its parts"
            )
        self._geometry = geometry
        self._data = self.manifest.data_dtype
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Return the number of samples of a view."""
        return self.manifest.num_samples

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    @property
    def checksum(self) -> str:
        """SHA-256 of the whole store."""
        return self.manifest.checksum

    def rows(self, wanted: Source | Iterable[str], view: int = 0) -> np.ndarray:
        """Return the rows of the samples with these keys: int64 [N]. Each view has its own order.

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
        absent = ours[found] != theirs
        if absent.any():
            names = [keys[int(i)] for i in np.flatnonzero(absent)]
            what = f"{len(names):,} of {len(keys):,} samples are not in the store: {some(names, 3)}"
            raise DataError(f"{self.folder}: {what}; was it made from this data?")

        after = order[np.minimum(places + 1, len(order) - 1)]
        twice = (ours[after] == theirs) & (after != found)
        if twice.any():
            name = keys[int(twice.argmax())]
            raise DataError(
                f"{self.folder}: {name} is twice in view {view}; it cannot be joined by keys"
            )
        return found

    def keys(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return the first half of the SHA-256 of each sample's key: uint8 [n, 16]."""
        return np.ascontiguousarray(self._index(rows, view)["key"])

    def labels(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return the labels, int64 [n], in the order of `manifest.classes`."""
        return self._index(rows, view)["label"].astype(np.int64)

    def readable(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return whether the image was readable when the store was made: bool [n].

        Only key and label of an unreadable image are stored.
        """
        return self._index(rows, view)["flags"] & READABLE != 0

    def outputs(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return the teacher's logits minus their maximum, float16 [n, C].

        Logits from `topk` hold for its temperature, see outputs.py.
        """
        form = self.manifest.outputs_form
        records = self._fields(rows, view, "max_logit" if form.k else "logits", "logits")
        return form.decode(records, self.manifest.num_classes)

    def max_logits(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return the maxima that were subtracted from the logits: float32 [n]."""
        return np.ascontiguousarray(self._fields(rows, view, "max_logit", "max_logit")["max_logit"])

    def _index(self, rows: np.ndarray, view: int) -> np.ndarray:
        """Return INDEX records [n]."""
        return self._gather("index", rows, view, 0, INDEX.itemsize).view(INDEX).ravel()

    def _fields(self, rows: np.ndarray, view: int, first: str, last: str) -> np.ndarray:
        """Return records [n] of the fields from `first` to `last` of .data."""
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
        """Return bytes `begin` to `end` of the records of `rows`: uint8 [n, end - begin]."""
        shards, places = self._locate(rows, view)
        if out is None:
            out = np.empty((len(shards), end - begin), np.uint8)
        maps = {shard: self._map(kind, shard)[:, begin:end] for shard in set(shards)}
        for i, (shard, place) in enumerate(zip(shards, places, strict=True)):
            out[i] = maps[shard][place]
        return out

    def _locate(self, rows: np.ndarray, view: int) -> tuple[list[int], list[int]]:
        """Return the shard of each row and the row's position in it."""
        rows = np.asarray(rows)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            given = f"{rows.min()} to {rows.max()}"
            raise IndexError(f"{self.folder}: has the rows 0 to {len(self) - 1}, not {given}")
        if not 0 <= view < self.num_views:
            raise IndexError(f"{self.folder}: has the views 0 to {self.num_views - 1}, not {view}")
        shards, places = np.divmod(rows, self._geometry.rows_per_shard)
        return (shards + view * self._geometry.shards_per_view).tolist(), places.tolist()

    def _map(self, kind: str, shard: int) -> np.ndarray:
        """Map a shard's file: uint8 [records, size], or uint8 [bytes] for encoded images."""
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
    """Q(x') of every sample and view (codes, images or both) with the teacher's outputs on it."""

    kind = "adversarial"

    def codes(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return packed codes, uint8 [n, code_bytes].

        `dad_fast.kernels.unpack_codes(codes, manifest.code_bits, manifest.num_codes)` gives
        int64 [n, h * w]. Raises UsageError when the store has no codes.
        """
        if not self.manifest.code_bytes:
            raise UsageError(
                f"{self.folder}: holds no codes, its discretizer has none; train on its images"
            )
        return self._fields(rows, view, "codes", "codes")["codes"]

    def kept(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return whether the teacher still predicts the label on Q(x'), so that the sample counts.

        bool [n]; False for unreadable samples.
        """
        return self._index(rows, view)["flags"] & KEPT != 0

    def changed(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return the share of codes that the attack changed: float32 [n], NaN if not measured."""
        return self._index(rows, view)["changed"]

    def images(self, rows: np.ndarray, view: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """Return the images, uint8 [n, H, W, 3], black for unreadable samples.

        Encoded images are decoded on all cores.

        out: C-contiguous array to fill, such as page-locked memory; reuse of a buffer halves the
            time.

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
        index = self._index(rows, view)
        files = {shard: self._map("images", shard) for shard in set(shards)}

        def decode(i: int) -> None:
            start, length = int(index["image_start"][i]), int(index["image_bytes"][i])
            content = files[shards[i]][start : start + length].tobytes()
            name = f"{self.folder / shard_file(shards[i], 'images')}: image of row {rows[i]}"
            out[i] = decode_image(content, manifest.image_size, name) if length else 0

        on_all_cores(decode, range(len(rows)), manifest.images)
        return out


class TargetStore(Store):
    """The teacher's outputs on augmented, mixed clean views.

    View v of a sample is the one that training uses in the epochs e with e mod num_views = v.
    """

    kind = "targets"


def open_store(folder: str | Path) -> AdversarialStore | TargetStore:
    """Open a store with the reader of its kind."""
    kinds = {store.kind: store for store in (AdversarialStore, TargetStore)}
    return kinds[Manifest.load(folder).kind](folder)
