"""The list of classes that every label, head and stored file is tied to."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
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
            raise DataError(
                f"a class list must have the ids 0 to {len(self.entries) - 1} in order, each once (--class-map)"
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
        """A CSV with the header id,folder,name (any order of rows). Raises DataError that names the file and the line."""
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(file)
                if missing := {"id", "folder", "name"} - set(rows.fieldnames or ()):
                    raise DataError(
                        f"{path}: no column {', '.join(sorted(missing))}; a class map has the header id,folder,name (--class-map)"
                    )
                entries = []
                for row in rows:
                    if (
                        not _NUMBER.fullmatch(row["id"] or "")
                        or not row["folder"]
                        or not row["name"]
                    ):
                        raise DataError(
                            f"{path}, line {rows.line_num}: a class needs a number, a folder and a name (--class-map)"
                        )
                    entries.append((int(row["id"]), row["folder"], row["name"]))
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
        """The sub-folders of `folder`, sorted by name; hidden ones are not classes. Raises DataError where there are none."""
        folders = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if not folders:
            raise DataError(
                f"{folder}: no class folders in it; images belong in one folder a class"
            )
        return cls(
            tuple(
                (i, name, text)
                for i, (name, text) in enumerate(zip(folders, readable_names(folders), strict=True))
            )
        )

    def to_json(self) -> str:
        """As UTF-8 can hold it: bytes of a folder's name that are none are JSON's own escapes, which `from_json` reads back."""
        entries = [list(entry) for entry in self.entries]
        text = json.dumps(entries, ensure_ascii=False)
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
    """A name for each class folder: ImageNet's (timm's table) for wnids, else the folder with blanks for underscores."""
    info = None
    if any(_WNID.fullmatch(folder) for folder in folders):
        info = _imagenet_22k()
    names = []
    for folder in folders:
        text = folder.replace("_", " ")
        if info is not None and _WNID.fullmatch(folder):
            try:
                text = info.label_name_to_description(folder).split(",")[0]
            except KeyError:
                pass  # a wnid outside ImageNet-22k keeps its number
        names.append(text)
    return names


@lru_cache(maxsize=1)
def _imagenet_22k() -> Any:
    """timm's table of 22,000 names, which takes a tenth of a second to read."""
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-22k")
