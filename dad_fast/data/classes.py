"""The list of classes that every label, head and stored file is tied to."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dad_fast.errors import DataError

_WNID = re.compile(r"n\d{8}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"\s*[0-9]{1,9}\s*")


@dataclass(frozen=True)
class ClassMap:
    """Classes in the order of a head's outputs: entries of (id, folder, name), ids 0 … C-1."""

    entries: tuple[tuple[int, str, str], ...]

    def __post_init__(self) -> None:
        if [entry[0] for entry in self.entries] != list(range(len(self.entries))):
            last = len(self.entries) - 1
            raise DataError(
                f"a class list must have the ids 0 to {last} in order, each once (--class-map)"
            )
        if not self.entries:
            raise DataError("the class list is empty (--class-map)")
        seen: set[str] = set()
        for _, folder, _name in self.entries:
            if folder in seen:
                raise DataError(f"class folder {folder!r} is twice in the class list (--class-map)")
            seen.add(folder)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        return iter(self.entries)

    @property
    def folders(self) -> list[str]:
        return [folder for _, folder, _ in self.entries]

    @property
    def names(self) -> list[str]:
        return [name for _, _, name in self.entries]

    @classmethod
    def from_csv(cls, path: str | Path) -> ClassMap:
        """Read a CSV with the header id,folder,name and rows in any order.

        Raises DataError that names the file and the line.
        """
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(file)
                if missing := {"id", "folder", "name"} - set(rows.fieldnames or ()):
                    names = ", ".join(sorted(missing))
                    raise DataError(
                        f"{path}: no column {names}; "
                        "a class map has the header id,folder,name (--class-map)"
                    )
                entries = []
                for row in rows:
                    number, folder, name = row["id"], row["folder"], row["name"]
                    if not _NUMBER.fullmatch(number or "") or not folder or not name:
                        raise DataError(
                            f"{path}, line {rows.line_num}: "
                            "a class needs a number, a folder and a name (--class-map)"
                        )
                    entries.append((int(number), folder, name))
        except FileNotFoundError as error:
            raise DataError(f"no class map {path} (--class-map)") from error
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a readable CSV: {error} (--class-map)") from error
        try:
            return cls(tuple(sorted(entries)))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def from_folders(cls, folder: str | Path) -> ClassMap:
        """Take the sub-folders of `folder`, sorted by name, without hidden ones, as classes.

        Raises DataError when there are none.
        """
        folders = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if not folders:
            raise DataError(
                f"{folder}: no class folders in it; put the images of each class in one, or see "
                "--labels teacher"
            )
        pairs = zip(folders, readable_names(folders), strict=True)
        return cls(tuple((i, name, text) for i, (name, text) in enumerate(pairs)))

    @classmethod
    def numbered(cls, count: int) -> ClassMap:
        """Return `count` classes that are named by their numbers."""
        return cls(tuple((i, str(i), str(i)) for i in range(count)))

    def to_json(self) -> str:
        """Return JSON that UTF-8 can hold, for `from_json`."""
        entries = [list(entry) for entry in self.entries]
        text = json.dumps(entries, ensure_ascii=False)
        # A folder's name that is not UTF-8 has surrogates, which JSON can escape.
        return json.dumps(entries) if _SURROGATE.search(text) else text

    @classmethod
    def from_json(cls, text: str) -> ClassMap:
        try:
            return cls(
                tuple((int(i), str(folder), str(name)) for i, folder, name in json.loads(text))
            )
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise DataError(
                f"not a recorded class list: {ascii(str(error)[:100])[1:-1]}"
            ) from error


def readable_names(folders: Sequence[str]) -> list[str]:
    """Return a name for each class folder.

    WordNet ids get ImageNet's name (timm's table), others the folder with blanks for underscores.
    """
    names = []
    for folder in folders:
        text = folder.replace("_", " ")
        if _WNID.fullmatch(folder):
            # An id outside ImageNet-22k keeps its number.
            with suppress(KeyError):
                text = _imagenet_22k().label_name_to_description(folder).split(",")[0]
        names.append(text)
    return names


@lru_cache(maxsize=1)
def _imagenet_22k() -> Any:
    """Load timm's table of 22,000 names, which takes a tenth of a second."""
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-22k")
