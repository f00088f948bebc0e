"""CSV and TSV lists of images: the columns path, label and, optionally, split.

Paths are relative to the list's folder, or absolute. Separators are tabs if the header has one, else
commas. Other columns are ignored.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np

from dad_fast.data.classes import ClassMap, readable_names
from dad_fast.data.sources.base import Listed
from dad_fast.data.sources.folder import FolderSource
from dad_fast.data.sources.index import PENDING, Entry, index_entries, index_file
from dad_fast.data.sources.names import PackedStrings, shown, some
from dad_fast.data.sources.pool import threads
from dad_fast.errors import DataError, UsageError

_HEADER = "a list has the header path,label or path,label,split"
# Names of all rows of a list without the column split.
_WHOLE = ("", ".", "train")
# Files per task.
_CHUNK = 256


class CsvList:
    """Rows of a list, in the order of their paths. A Listing; opens no image.

    label_of and split_of: int32 [N], positions in `labels` and `splits`. Without a column split,
    `splits` is empty.
    """

    def __init__(self, file: Path, lines: list[tuple[str, str, str]], has_splits: bool) -> None:
        """lines: path, label and split of each row."""
        self.file = file
        self.labels = sorted({label for _, label, _ in lines}, key=label_order)
        self.splits = sorted({split for _, _, split in lines}) if has_splits else []
        label_place = {label: i for i, label in enumerate(self.labels)}
        split_place = {split: i for i, split in enumerate(self.splits)}
        lines = sorted(lines)
        self.paths = PackedStrings(path for path, _, _ in lines)
        self.label_of = np.array([label_place[label] for _, label, _ in lines], dtype=np.int32)
        self.split_of = np.array(
            [split_place.get(split, 0) for _, _, split in lines], dtype=np.int32
        )

    def has_split(self, split: str) -> bool:
        return split in (self.splits or _WHOLE) or not split

    def classes(self, fixed: ClassMap | None) -> ClassMap:
        """Return the class list: the labels of all splits, sorted, or `fixed`.

        Raises DataError when a label is not in `fixed`.
        """
        if fixed is not None:
            self._numbers(fixed)
            return fixed
        pairs = zip(self.labels, readable_names(self.labels), strict=True)
        return ClassMap(tuple((i, label, name) for i, (label, name) in enumerate(pairs)))

    def rows(self, split: str) -> np.ndarray:
        """Return the positions of a split's rows, int64 [N]; all of them for "".

        Raises UsageError when the list has no such split, DataError when it has a path twice.
        """
        if not self.has_split(split):
            if self.splits:
                raise UsageError(
                    f"{self.file} has no split {split!r}; it has {some(map(shown, self.splits))} "
                    "(--train-split, --val-split, --suite, --split)"
                )
            raise UsageError(
                f"{self.file} has no column split, so it has no split {split!r}: add the column, "
                "or --val-fraction 0.1 to hold out a share of the training images"
            )
        if not split or not self.splits:
            rows = np.arange(len(self.paths))
        else:
            rows = np.flatnonzero(self.split_of == self.splits.index(split))
        before = None
        for row in rows.tolist():
            path = self.paths[row]
            if path == before:
                raise DataError(f"{self.file}: {shown(path)} is listed twice; keep one row of it")
            before = path
        return rows

    def entries(self, split: str) -> list[Entry]:
        """Return the images of a split with their sizes; a file that is missing has size 0."""
        rows = iter(self.rows(split).tolist())
        chunks = list(iter(lambda: list(islice(rows, _CHUNK)), []))
        with threads() as pool:
            found = pool.map(partial(_entries_of, self), chunks)
            return [entry for chunk in found for entry in chunk]

    def images(self, split: str, fixed: ClassMap | None) -> Listed:
        return Listed(f"csv:{self.file}", self.classes(fixed), self.entries(split))

    def contents(self, split: str) -> Iterator[tuple[str, Path | BytesIO]]:
        for row in self.rows(split).tolist():
            yield self.paths[row], self.file.parent / self.paths[row]

    def class_numbers(self, rows: np.ndarray, classes: ClassMap) -> np.ndarray:
        """Return the labels of rows, int64 [N]. Raises DataError for one that is no class."""
        return self._numbers(classes)[self.label_of[rows]]

    def _numbers(self, classes: ClassMap) -> np.ndarray:
        """Return the class number of each label: of the class with this folder, or, where no label
        is a folder, with this id.
        """
        number_of = {folder: i for i, folder, _ in classes}
        if not any(label in number_of for label in self.labels):
            number_of = {str(i): i for i, _, _ in classes}
        unknown = [shown(label) for label in self.labels if label not in number_of]
        if unknown:
            raise DataError(
                f"{self.file}: {len(unknown):,} of its {len(self.labels):,} labels are not in the "
                f"class list: {some(unknown)} (--class-map)"
            )
        return np.array([number_of[label] for label in self.labels], dtype=np.int64)


class CsvSource(FolderSource):
    """A split of a list, in the order of paths, whatever the order of its rows.

    The fingerprint covers paths, labels, file sizes and readability.
    """

    def __init__(
        self,
        file: Path,
        split: str = "",
        classes: ClassMap | None = None,
        max_bad_share: float = 0.01,
    ) -> None:
        listed = read_csv(str(file))
        classes = listed.classes(classes)
        labels = listed.class_numbers(listed.rows(split), classes)
        part = split if listed.splits else ""
        name = f"{file}, split {shown(part)}" if part else str(file)
        path = file.resolve()
        index = index_file(path / f"\0list {part}")
        about = f"list {str(path)!r}, split {part!r}"
        entries = index_entries(index, about, path.parent, listed.entries(split), name)
        self._hold(path.parent, classes, entries, labels, max_bad_share, name)
        digest = hashlib.sha256(f"{self.fingerprint}\n".encode())
        for label in labels.tolist():
            digest.update(f"{classes.folders[label]}\0".encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()


def open_csv(
    argument: str, split: str, classes: ClassMap | None, max_bad_share: float
) -> CsvSource:
    """Open a split of the list `argument`."""
    return CsvSource(Path(argument), split, classes, max_bad_share)


def read_csv(argument: str) -> CsvList:
    """Read a list. Raises DataError that names the file and the line."""
    file = Path(argument)
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"{argument}: {error.strerror} (--data-dir csv:FILE)") from error
    return _read(argument, stat.st_size, stat.st_mtime_ns)


# Called several times when a run starts.
@lru_cache(maxsize=1)
def _read(argument: str, size: int, mtime: int) -> CsvList:
    try:
        with open(argument, newline="", encoding="utf-8-sig") as file:
            separator = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            rows = csv.DictReader(file, delimiter=separator)
            columns = rows.fieldnames or ()
            missing = [name for name in ("path", "label") if name not in columns]
            if missing:
                raise DataError(
                    f"{argument}: no column {', '.join(missing)}; {_HEADER} (--data-dir)"
                )
            needed = [name for name in ("path", "label", "split") if name in columns]
            lines = []
            for row in rows:
                for name in needed:
                    if not row[name]:
                        raise DataError(f"{argument}, line {rows.line_num}: no {name}; {_HEADER}")
                lines.append((row["path"], row["label"], row.get("split") or ""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{argument}: not a readable CSV: {error} (--data-dir)") from error
    if not lines:
        raise DataError(f"{argument}: no images in it; {_HEADER} (--data-dir)")
    return CsvList(Path(argument), lines, "split" in columns)


def _entries_of(listed: CsvList, rows: list[int]) -> list[Entry]:
    """Return the entries of rows, not verified."""
    found = []
    for row in rows:
        path = listed.paths[row]
        label = listed.labels[listed.label_of[row]]
        try:
            stat = os.stat(listed.file.parent / path)
            size, mtime = stat.st_size, stat.st_mtime_ns
        # ValueError for a path with a zero byte.
        except (OSError, ValueError):
            size, mtime = 0, 0
        found.append(Entry(path, label, 0, size, mtime, 0, 0, "", False, PENDING))
    return found


def label_order(label: str) -> tuple[bool, int, str]:
    """Sort key of labels: class numbers by value, before other labels."""
    number = label.isascii() and label.isdigit() and len(label) < 10
    return not number, int(label) if number else 0, label
