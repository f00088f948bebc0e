"""Image folders with one sub-folder per class, read through an index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Listed
from dad_fast.data.sources.decode import read_rgb, read_unchanged
from dad_fast.data.sources.index import (
    Entry,
    build_index,
    files_of,
    report_bad,
    report_few_bits,
    scan_folder,
)
from dad_fast.data.sources.names import PackedStrings, shown, some
from dad_fast.data.sources.tar import find_shards, shards_hint
from dad_fast.data.sources.tar_index import read_shards, scan_shards
from dad_fast.errors import DataError


class FolderSource:
    """A split of an image folder, in the order of paths, whatever the order of the classes.

    The fingerprint covers paths, file sizes and readability, not mtimes: a copy of the folder has
    the same fingerprint.
    """

    def __init__(
        self,
        root: Path,
        split: str = "",
        classes: ClassMap | None = None,
        max_bad_share: float = 0.01,
        other_folders: bool = False,
    ) -> None:
        """other_folders: leave out folders that are not in the class list, instead of an error."""
        folder = find_folder(root, split)
        classes = _check_classes(folder, classes, other_folders)
        entries = build_index(folder, classes.folders)
        label_of = {name: i for i, name in enumerate(classes.folders)}
        labels = np.array([label_of[entry.label] for entry in entries], dtype=np.int64)
        self._hold(folder, classes, entries, labels, max_bad_share)

    def _hold(
        self,
        folder: Path,
        classes: ClassMap,
        entries: Sequence[Entry],
        labels: np.ndarray,
        max_bad_share: float,
        name: str = "",
    ) -> None:
        self.folder = folder
        self.name = name or str(folder)
        self.max_bad_share = max_bad_share
        self.classes = classes
        self.labels = labels
        self.keys: Sequence[str] = PackedStrings(entry.path for entry in entries)
        self.sizes = np.array([(entry.width, entry.height) for entry in entries], dtype=np.int32)
        self.ok = np.array([entry.ok for entry in entries], dtype=bool)
        self.files = files_of(entries, lambda i: shown(entries[i].path))
        digest = hashlib.sha256()
        for entry in entries:
            line = f"{entry.path}\0{entry.size}\0{entry.ok}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()
        report_bad(self.name, self.files.bad, len(entries), max_bad_share)
        report_few_bits(self.name, self.files)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        return read_rgb(self.folder / self.keys[index])

    def encoded(self, index: int) -> bytes | None:
        if not self.files.plain_jpeg(index):
            return None
        return read_unchanged(self.folder / self.keys[index], int(self.files.num_bytes[index]))

    def describe(self) -> str:
        text = f"{self.name}: {len(self):,} images of {len(self.classes):,} classes"
        bad = int((~self.ok).sum())
        return f"{text}, {bad:,} unreadable" if bad else text


class PathListing:
    """The images of a path: of an image folder or of shards. A Listing; opens no image."""

    def __init__(self, path: str) -> None:
        self.path = path

    def has_split(self, split: str) -> bool:
        """Return whether the folder, or the first shard of a pattern, exists."""
        if (Path(self.path) / split).is_dir():
            return True
        shards = find_shards(self.path, split) if split.endswith(".tar") else None
        return shards is not None and (shards[0] / shards[1][0]).is_file()

    def images(self, split: str, fixed: ClassMap | None) -> Listed:
        shards = find_shards(self.path, split)
        if shards is not None:
            return list_shards(*shards, fixed)
        folder = find_folder(Path(self.path), split)
        classes = fixed or ClassMap.from_folders(folder)
        return Listed(str(folder), classes, scan_folder(folder, classes.folders)[0])

    def contents(self, split: str) -> Iterator[tuple[str, Path | BytesIO]]:
        shards = find_shards(self.path, split)
        if shards is not None:
            yield from read_shards(*shards)
            return
        folder = find_folder(Path(self.path), split)
        for entry in scan_folder(folder, [""])[0]:
            path = folder / entry.path
            yield str(path), path


def list_shards(base: Path, names: Sequence[str], fixed: ClassMap | None) -> Listed:
    """List the images of shards from their headers; without `fixed`, classes are numbers."""
    entries = scan_shards(base, names)
    highest = max((int(entry.label) for entry in entries if entry.label), default=0)
    name = f"{len(names):,} shards in {base}"
    return Listed(name, fixed or ClassMap.numbered(highest + 1), entries)


def open_folder(
    argument: str, split: str, classes: ClassMap | None, max_bad_share: float
) -> FolderSource:
    """Open a split of the image folder `argument`."""
    return FolderSource(Path(argument), split, classes, max_bad_share)


def find_folder(root: Path, split: str) -> Path:
    """Return the folder of a split. Raises DataError that lists the existing folders."""
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {problem} (--data-dir)")
    if split and not (root / split).is_dir():
        folders = sorted(
            item.name for item in root.iterdir() if item.is_dir() and not item.name.startswith(".")
        )
        has = f"it has {some(folders) or 'none'}{shards_hint(root)}"
        raise DataError(f"{root} has no folder {split!r}; {has}{_fix(split, bool(folders))}")
    return root / split


def _fix(split: str, has_folders: bool) -> str:
    """Return what to type for a split that is missing."""
    if split == "val":
        return (
            "; add --val-fraction 0.1 to hold out a share of the training images, or name the folder "
            "with --val-split (valid, validation and test are found)"
        )
    if split == "train" and has_folders:
        return (
            "; name the folder with --train-split, or if these are the classes, write --train-split "
            ". --val-fraction 0.1"
        )
    return " (--data-dir, --train-split, --val-split)"


def _check_classes(folder: Path, classes: ClassMap | None, other_folders: bool) -> ClassMap:
    found = ClassMap.from_folders(folder)
    if classes is None:
        return found
    missing = sorted(set(classes.folders) - set(found.folders))
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing):,} of the {len(classes):,} listed classes: "
            f"{some(missing)} (--class-map)"
        )
    extra = sorted(set(found.folders) - set(classes.folders))
    if extra and not other_folders:
        raise DataError(
            f"{folder} has {len(extra):,} folders that are not in the class list: "
            f"{some(extra)} (--class-map)"
        )
    return classes
