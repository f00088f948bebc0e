"""hfds:NAME[@SPLIT][,image=COLUMN][,label=COLUMN]: image data sets of the library `datasets`.

NAME is a folder that `save_to_disk` wrote, a folder that `load_dataset` reads (Parquet, an image
folder's metadata, ... without scripts), or hf-hub:OWNER/NAME[/CONFIG], the only one that uses the
network. `datasets` finds the Arrow files; the images are read from them here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.arrow.source import ArrowSource, Part, join_labels, labels_of, schema_of
from dad_fast.data.sources.arrow.table import WHOLE, find_columns, import_extra, parse
from dad_fast.data.sources.base import Listed
from dad_fast.data.sources.names import shown, some
from dad_fast.errors import DataError, EnvironmentProblem, UsageError

_HUB = "hf-hub:"
# Splits of a set on disk that has none have this name.
_ONLY = ""


class HfDataset:
    """The splits of a data set. A Listing; opens no image."""

    def __init__(self, argument: str) -> None:
        whole = parse(argument)
        # A folder may have an @ in its name.
        if whole.split and Path(f"{whole.path}@{whole.split}").is_dir():
            whole = whole._replace(path=f"{whole.path}@{whole.split}", split="")
        self.table = whole
        self.name = f"hfds:{whole.path}"
        self.splits = _load(whole.path, _changed(whole.path))
        if whole.split and whole.split not in self.splits:
            self._refuse(whole.split)

    def has_split(self, split: str) -> bool:
        return self._find(split) is not None

    def part(self, split: str, labelled: bool = True) -> Part:
        """Return the files of a split. Raises UsageError when there is no such split."""
        found = self._find(split)
        if found is None:
            self._refuse(split)
        files = self.splits[found]
        name = f"{self.name}@{found}" if found else self.name
        columns = find_columns(schema_of(files[0]), self.table, name, labelled)
        every = [file for others in self.splits.values() for file in others]
        labels = [] if columns.names or not labelled else labels_of(every, columns)
        return Part(name, files, columns, labels)

    def images(self, split: str, fixed: ClassMap | None) -> Listed:
        part = self.part(split)
        entries = [entry for rows in part.scan() for entry in rows]
        classes, _ = join_labels(part, {entry.label for entry in entries if entry.label}, fixed)
        return Listed(part.name, classes, entries)

    def contents(self, split: str) -> Iterator[tuple[str, Path | BytesIO]]:
        part = self.part(split, labelled=False)
        for key, content in part.contents():
            yield f"{part.name}:{key}", content

    def _find(self, split: str) -> str | None:
        """Return the split of this name; the only one also answers to other names."""
        if self.table.split:
            return self.table.split if split in (*WHOLE, self.table.split) else None
        if split in self.splits:
            return split
        only = next(iter(self.splits)) if len(self.splits) == 1 else None
        return only if only is not None and split in (WHOLE if not only else WHOLE[:2]) else None

    def _refuse(self, split: str) -> NoReturn:
        named = [name for name in self.splits if name]
        has = f"it has {some(map(shown, named))}" if named else "it is one set without splits"
        hint = "--train-split, --val-split, --suite, --split"
        if not named:
            hint = "--val-fraction 0.1 holds out a share of it"
        elif self.table.split in named:
            hint = f"@{self.table.split} takes one alone: leave it out"
        elif not split:
            hint = "add @SPLIT"
        raise UsageError(f"{self.name} has no split {split!r}; {has} ({hint})")


def open_hfds(
    argument: str, split: str, classes: ClassMap | None, max_bad_share: float
) -> ArrowSource:
    """Open a split of a data set."""
    return ArrowSource(HfDataset(argument).part(split), classes, max_bad_share)


def _changed(path: str) -> tuple[int, ...]:
    """Return the times at which a local data set was written."""
    names = ("", "dataset_dict.json", "state.json", "README.md", "data")
    files = [Path(path) / name for name in names]
    return tuple(file.stat().st_mtime_ns for file in files if file.exists())


# Called several times when a run starts.
@lru_cache(maxsize=4)
def _load(path: str, changed: tuple[int, ...]) -> dict[str, list[Path]]:
    """Return the Arrow files of each split. Raises UsageError, DataError or EnvironmentProblem."""
    name = f"hfds:{path}"
    if not path:
        raise UsageError(
            "hfds: names no data set: write hfds:FOLDER or hfds:hf-hub:OWNER/NAME (--data-dir)"
        )
    on_hub = path.startswith(_HUB)
    if not on_hub and not Path(path).is_dir():
        raise DataError(
            f"{name}: no such folder; a set on the hub is hfds:{_HUB}OWNER/NAME (--data-dir)"
        )
    datasets = import_extra("datasets", name)
    try:
        with _quiet(datasets, offline=not on_hub):
            found = _read_hub(datasets, path) if on_hub else _read_folder(datasets, Path(path))
    except DataError:
        raise
    except Exception as error:
        # `datasets` raises the errors of its builders, of the file system and of the hub's client.
        raise _problem(name, error, on_hub) from error
    splits = found if isinstance(found, dict) else {_ONLY: found}
    files = {
        str(split): [Path(file["filename"]) for file in dataset.cache_files]
        for split, dataset in splits.items()
    }
    empty = [shown(split) for split, paths in files.items() if not paths]
    if empty or not files:
        raise DataError(f"{name}: no images in it ({some(empty) or 'no splits'}) (--data-dir)")
    return files


def _read_folder(datasets: Any, folder: Path) -> Any:
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if saved:
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(str(folder.resolve()))


def _read_hub(datasets: Any, path: str) -> Any:
    owner, _, rest = path.removeprefix(_HUB).partition("/")
    name, _, config = rest.partition("/")
    return datasets.load_dataset(f"{owner}/{name}" if name else owner, config or None)


def _problem(name: str, error: Exception, on_hub: bool) -> DataError | EnvironmentProblem:
    # The builders' own error hides the reason in its cause.
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
    why = " ".join(str(cause or error).split())[:200] or type(error).__name__
    missing = type(error).__name__ in ("DatasetNotFoundError", "DataFilesNotFoundError")
    if on_hub and isinstance(error, OSError) and not missing:
        return EnvironmentProblem(
            f"{name}: {why}; check the network, or download it elsewhere, save_to_disk(FOLDER), and "
            "name hfds:FOLDER (--data-dir)"
        )
    return DataError(f"{name}: datasets cannot read it: {why} (--data-dir)")


@contextmanager
def _quiet(datasets: Any, offline: bool) -> Iterator[None]:
    """Silence `datasets`, whose log repeats its errors; offline: keep it from the network."""
    from huggingface_hub import constants

    settings = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in settings]
    bars = not sys.stderr.isatty() and not datasets.utils.are_progress_bars_disabled()
    logging.disable(logging.ERROR)
    if bars:
        datasets.disable_progress_bars()
    for module, name in settings if offline else ():
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(settings, before, strict=True):
            setattr(module, name, value)
        if bars:
            datasets.enable_progress_bars()
        logging.disable(logging.NOTSET)
