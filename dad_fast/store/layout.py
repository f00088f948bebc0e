"""Layout of a store's bytes: record types, positions of records, and their checksums.

A store holds, for each of its views, one record per sample. A view's samples are cut into blocks of
`block_size` (the unit of work), and `blocks_per_shard` blocks make a shard; a shard belongs to one
view. Shard i is up to three files, each an array without a header:

    shard-000000.index    INDEX records: key, label, flags, share of codes changed, checksums
    shard-000000.data     codes and teacher outputs, fixed records (see `data_dtype`)
    shard-000000.images   images in their training form: fixed records when raw, else one file after
                          the other (image_start, image_bytes)

Own format: random batches of 256 at 273,000 records/s (lmdb 199,000, array_record 76,000, zarr
2,400 to 3,000), resume by blocks, a checksum per record, identical bytes from any number of
writers.

All numbers are little-endian, records are packed.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dad_fast.store.outputs import OutputsForm

# Bits of `flags`.
READABLE, KEPT = 1, 2

INDEX = np.dtype(
    [
        ("key", "u1", (16,)),  # the first half of the SHA-256 of the sample's key
        ("row", "<u4"),  # position in its view
        ("label", "<i4"),
        ("view", "<u2"),
        ("flags", "<u2"),
        ("changed", "<f4"),  # share of the codes that the attack changed; NaN without codes
        ("image_start", "<u8"),  # in the shard's .images
        ("image_bytes", "<u4"),
        ("image_crc", "<u4"),  # CRC-32 of those bytes
        ("data_crc", "<u4"),  # CRC-32 of the record in .data
        ("crc", "<u4"),  # CRC-32 of this record, up to here
    ]
)
_INDEX_BODY = INDEX.itemsize - 4


def data_dtype(code_bytes: int, outputs: OutputsForm, num_classes: int) -> np.dtype[Any]:
    """Return the type of a .data record: outputs first, then codes, whose length may be odd."""
    fields: list[Any] = outputs.fields(num_classes)
    if code_bytes:
        fields.append(("codes", "u1", (code_bytes,)))
    if odd := np.dtype(fields).itemsize % 4:
        fields.append(("padding", "u1", (4 - odd,)))
    return np.dtype(fields)


def describe_dtype(dtype: np.dtype[Any]) -> list[list[Any]]:
    """Return [name, type, shape] of each field.

    `numpy.dtype([(n, t, tuple(s)) for n, t, s in …])` is the inverse.
    """
    assert dtype.names is not None
    fields = [(name, dtype[name]) for name in dtype.names]
    return [[name, field.base.str.replace("|", ""), list(field.shape)] for name, field in fields]


def hash_keys(keys: Iterable[str]) -> np.ndarray:
    """Hash the samples' keys as the index stores them: uint8 [N, 16]."""
    digests = b"".join(
        hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:16] for key in keys
    )
    return np.frombuffer(digests, np.uint8).reshape(-1, 16)


@dataclass(frozen=True)
class RowBlock:
    """Rows start … stop - 1 of a view, the unit of work.

    Only a view's last block is smaller than `block_size`.
    """

    number: int  # within its view
    view: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Geometry(NamedTuple):
    """Assignment of rows to shards."""

    num_samples: int
    num_views: int
    block_size: int
    blocks_per_shard: int

    @property
    def rows_per_shard(self) -> int:
        return self.block_size * self.blocks_per_shard

    @property
    def shards_per_view(self) -> int:
        return -(-self.num_samples // self.rows_per_shard)

    @property
    def num_shards(self) -> int:
        return self.shards_per_view * self.num_views

    def place(self, shard: int) -> tuple[int, int, int]:
        """Return (view, start, stop), the rows of a shard."""
        view, number = divmod(shard, self.shards_per_view)
        start = number * self.rows_per_shard
        return view, start, min(start + self.rows_per_shard, self.num_samples)

    def blocks(self, shard: int) -> list[RowBlock]:
        view, start, stop = self.place(shard)
        size = self.block_size
        return [
            RowBlock(first // size, view, first, min(first + size, stop))
            for first in range(start, stop, size)
        ]


def shard_file(shard: int, kind: str) -> str:
    return f"shard-{shard:06d}.{kind}"


def seal(index: np.ndarray) -> None:
    """Fill in the `crc` of INDEX records."""
    raw = index.view(np.uint8).reshape(len(index), INDEX.itemsize)
    index["crc"] = [zlib.crc32(record[:_INDEX_BODY].data) for record in raw]


def crcs(records: np.ndarray) -> np.ndarray:
    """Return the CRC-32 of each row of uint8 [N, size]."""
    return np.array([zlib.crc32(record.data) for record in records], dtype=np.uint32)


def broken_rows(index: np.ndarray, data: np.ndarray, view: int, start: int) -> dict[int, str]:
    """Return the damaged or misplaced rows with the reason.

    `index` INDEX [N] and `data` uint8 [N, size] must be contiguous.
    """
    raw = index.view(np.uint8).reshape(len(index), INDEX.itemsize)
    bad: dict[int, str] = {}
    intact = crcs(raw[:, :_INDEX_BODY]) == index["crc"]
    for i in np.flatnonzero(~intact):
        bad[start + int(i)] = "its index record is damaged"
    misplaced = (index["view"] != view) | (index["row"] != np.arange(start, start + len(index)))
    for i in np.flatnonzero(misplaced & intact):
        bad[start + int(i)] = f"holds row {index['row'][i]} of view {index['view'][i]}"
    for i in np.flatnonzero(intact & ~misplaced & (crcs(data) != index["data_crc"])):
        bad[start + int(i)] = "its codes or outputs are damaged"
    return bad
