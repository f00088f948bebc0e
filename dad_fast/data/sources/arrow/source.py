"""Arrow files as a source: images in the order of the rows, read from their place in the file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dad_fast.data.classes import ClassMap, readable_names
from dad_fast.data.sources.arrow.table import Columns, import_extra, rows_of
from dad_fast.data.sources.csv_list import label_order
from dad_fast.data.sources.index import Entry
from dad_fast.data.sources.names import PackedStrings, shown, some
from dad_fast.data.sources.tar import ShardSource, check_labels
from dad_fast.data.sources.tar_index import Shard, build_shard_index, read_bytes, state_of
from dad_fast.errors import DataError

log = logging.getLogger("dad_fast.data")


class Part:
    """The Arrow files of a split. labels: of all splits, where `columns` has no names of classes.

    prefixes: of the keys, one for each file, before the row in the file; without them the keys are
    the rows of all files.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        columns: Columns,
        labels: Sequence[str] = (),
        prefixes: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.files = files
        self.columns = columns
        self.labels = labels
        self.prefixes = prefixes

    def keys(self, found: Sequence[Sequence[Entry]]) -> Iterator[str]:
        first = 0
        for number, entries in enumerate(found):
            for entry in entries:
                if self.prefixes:
                    yield f"{self.prefixes[number]}:{entry.path}"
                else:
                    yield str(first + int(entry.path))
            first += len(entries)

    def scan(self) -> list[list[Entry]]:
        """Return the rows of each file, not verified."""
        return [scan_arrow(state_of(file), "", self.columns)[0] for file in self.files]

    def contents(self) -> Iterator[tuple[str, BytesIO]]:
        """Yield the key and the encoded image of each row."""
        found = self.scan()
        keys = self.keys(found)
        for file, entries in zip(self.files, found, strict=True):
            shard = state_of(file)
            for entry in entries:
                yield next(keys), BytesIO(read_bytes(shard, entry.offset, entry.size))


class ArrowSource(ShardSource):
    """Rows of Arrow files, in their order."""

    shards = "Arrow files"

    def __init__(self, part: Part, fixed: ClassMap | None, max_bad_share: float) -> None:
        columns = part.columns
        detail = f", columns {columns.image!r} and {columns.label!r}"
        names = part.prefixes or [str(file) for file in part.files]
        scan = partial(scan_arrow, columns=columns)
        shards, found = build_shard_index(part.name, names, part.files, scan, detail)
        keys = PackedStrings(part.keys(found))
        super().__init__(part.name, shards, found, keys, max_bad_share)
        entries = [entry for rows in found for entry in rows]
        present = {entry.label for entry in entries if entry.ok}
        self.classes, numbers = join_labels(part, present, fixed)
        # Only unreadable images have another label.
        self.labels = np.array([numbers.get(entry.label, 0) for entry in entries], dtype=np.int64)


def join_labels(
    part: Part, present: set[str], fixed: ClassMap | None
) -> tuple[ClassMap, dict[str, int]]:
    """Return the class list and the class number of each label in `present`.

    Without `fixed` the classes are the names of ClassLabel; else the labels of all splits, numbers
    from 0 to the highest. With it a label is the class with its name as folder, or as name, or,
    where no label has either, the class with this number.
    """
    columns, where = part.columns, part.name
    if not present:
        raise DataError(f"{where}: no row has a class in the column {columns.label}")
    spoken = {label: label for label in present}
    if columns.names:
        beyond = sorted(label for label in present if int(label) >= len(columns.names))
        if beyond:
            raise DataError(
                f"{where}: the column {columns.label} has the class {some(beyond)}, and its feature "
                f"ClassLabel names 0 to {len(columns.names) - 1}"
            )
        spoken = {label: columns.names[int(label)] for label in present}
    if fixed is None:
        classes = _own_classes(part, present)
        number_of = {folder: i for i, folder, _ in classes}
        return classes, {label: number_of[spoken[label]] for label in present}

    number_of = {folder: i for i, folder, _ in fixed}
    if not any(name in number_of for name in spoken.values()):
        number_of = {name: i for i, _, name in fixed}
    if not any(name in number_of for name in spoken.values()):
        number_of, spoken = {str(i): i for i, _, _ in fixed}, {label: label for label in present}
        if columns.names:
            log.warning(
                "%s: none of its classes (%s) is in the class list by name: its numbers are taken",
                where,
                some(map(shown, columns.names), 3),
            )
    unknown = sorted(shown(name) for name in spoken.values() if name not in number_of)
    if unknown:
        raise DataError(
            f"{where}: {len(unknown):,} of its {len(present):,} labels are not in the class list: "
            f"{some(unknown)} (--class-map)"
        )
    return fixed, {label: number_of[name] for label, name in spoken.items()}


def _own_classes(part: Part, present: set[str]) -> ClassMap:
    labels = sorted({*part.labels, *present}, key=label_order)
    if part.columns.numbers and not part.columns.names:
        return check_labels(part.name, np.array([int(label) for label in labels]), None)
    folders = part.columns.names or labels
    names = readable_names(folders)
    return ClassMap(tuple((i, *pair) for i, pair in enumerate(zip(folders, names, strict=True))))


def scan_arrow(shard: Shard, name: str, columns: Columns) -> tuple[list[Entry], str]:
    """Return the rows of an Arrow file as entries, not verified, and why there are none."""
    with open_arrow(Path(shard.path)) as (batches, base):
        entries = list(rows_of(batches, columns, shard, base))
    return entries, "" if entries else f"{name}: no rows in it"


def labels_of(files: Iterable[Path], columns: Columns) -> list[str]:
    """Return the labels in Arrow files, each once."""
    found: set[str] = set()
    for file in files:
        with open_arrow(file) as (batches, _):
            for batch in batches:
                values = batch.column(columns.label).unique().to_pylist()
                found.update(str(value) for value in values if value is not None)
    return sorted(label for label in found if not (columns.numbers and int(label) < 0))


def schema_of(file: Path) -> Any:
    with open_arrow(file) as (batches, _):
        return batches.schema


@contextmanager
def open_arrow(file: Path) -> Iterator[tuple[Any, int]]:
    """Map an Arrow stream; yields its record batches and the address of the file's first byte.

    Raises DataError for a file that is none.
    """
    pa = import_extra("pyarrow", str(file))
    try:
        with pa.memory_map(str(file)) as mapped:
            content = mapped.read_buffer()
            yield pa.ipc.open_stream(content), content.address
    except (OSError, pa.ArrowInvalid) as error:
        why = " ".join(str(error).split())[:160]
        raise DataError(f"{file}: cannot be read as Arrow: {why}; write it again") from error
