"""parquet:PATH[@SPLIT][,image=COLUMN][,label=COLUMN]: Parquet files of images.

PATH is a folder, a file, or a pattern with {000..099} or *, also behind a URL that fsspec opens.
A Parquet file is compressed and read by row groups, so that a shuffled epoch would read each many
times over: 6.0 ms of CPU and 8.6 MB for a JPEG of 86 KB in groups of 100 rows. So its two columns are
unpacked into the cache once, as Arrow.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from dad_fast.cache import cache_dir, one_at_a_time
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.arrow.source import (
    ArrowSource,
    Part,
    join_labels,
    labels_of,
    schema_of,
)
from dad_fast.data.sources.arrow.table import (
    WHOLE,
    Columns,
    Table,
    find_columns,
    images_of,
    import_extra,
    parse,
    rows_of,
)
from dad_fast.data.sources.base import Listed
from dad_fast.data.sources.http import download_file
from dad_fast.data.sources.index import Entry
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.pool import progress_bar
from dad_fast.data.sources.tar import expand
from dad_fast.errors import DataError, EnvironmentProblem, UsageError

log = logging.getLogger("dad_fast.data")

_FLAGS = "--data-dir, --train-split, --val-split"
_SUFFIX = ".parquet"
# Images per record batch: one has at most 2 GiB.
_BATCH = 64
_TRIES = 4
# Seconds before the second try; doubled before each further one.
_PAUSE = 0.5


class File(NamedTuple):
    """A Parquet file. state: changes with its content."""

    name: str
    url: str
    state: str


class ParquetFiles:
    """The files that a path or a URL names. A Listing; opens no image."""

    def __init__(self, argument: str) -> None:
        self.table = parse(argument)
        if Path(argument).exists():
            self.table = self.table._replace(path=argument, split="")
        if not self.table.path:
            raise UsageError("parquet: names no files: write parquet:FOLDER (--data-dir)")
        self.path = self.table.path.rstrip("/") or "/"
        self.is_http = self.path.startswith(("http://", "https://"))
        self.is_local = "://" not in self.path
        self.name = f"parquet:{self.path}"

    def has_split(self, split: str) -> bool:
        return bool(self._find(split))

    def files(self, split: str) -> list[File]:
        """Return the files of a split, by name. Raises UsageError without such a split."""
        urls = self._find(split)
        if not urls and self.is_local and not _is_pattern(self.path):
            if not Path(self.path).exists():
                raise DataError(f"{self.name}: no such file or folder (--data-dir)")
        if not urls and self.is_http and not _is_pattern(self.path):
            raise UsageError(
                f"{self.name}: folders behind a URL cannot be listed: name the files of {split!r} by "
                f"a pattern, as in --train-split 'train-{{000..009}}.parquet' ({_FLAGS})"
            )
        if not urls:
            asked = (self.table.split or split) if split in WHOLE else split
            raise UsageError(f"{self.name} has no split {asked!r}; {self._has(asked)} ({_FLAGS})")
        return [File(url.rpartition("/")[2], url, _state(url)) for url in urls]

    def part(self, split: str, labelled: bool = True) -> Part:
        """Unpack the files of a split that are not in the cache, and return their Arrow files.

        Raises DataError for a file that is damaged or not there, EnvironmentProblem for a server
        that cannot be reached and for a cache that cannot be written.
        """
        files = self.files(split)
        unpacked = self._unpack(files, labelled)
        found = [
            find_columns(schema_of(arrow), self.table, file.url, labelled)
            for file, arrow in zip(files, unpacked, strict=True)
        ]
        columns = _common(files, found)
        labels = labels_of(unpacked, columns) if labelled and not columns.names else []
        return Part(self._title(split), unpacked, columns, labels, [file.name for file in files])

    def images(self, split: str, fixed: ClassMap | None) -> Listed:
        """List the rows. Local files stay packed: sizes are the mean of their file."""
        if self.is_local:
            files = self.files(split)
            read = [_rows_in(file.url, self.table) for file in files]
            found = [entries for entries, _ in read]
            part = Part(self._title(split), [], _common(files, [columns for _, columns in read]))
        else:
            part = self.part(split)
            found = part.scan()
        entries = [entry for rows in found for entry in rows]
        classes, _ = join_labels(part, {entry.label for entry in entries if entry.label}, fixed)
        return Listed(part.name, classes, entries)

    def contents(self, split: str) -> Iterator[tuple[str, Path | BytesIO]]:
        if not self.is_local:
            yield from self.part(split, labelled=False).contents()
            return
        for file in self.files(split):
            with _open(file.url) as packed:
                columns = find_columns(packed.schema_arrow, self.table, file.url, labelled=False)
                row = 0
                for batch in packed.iter_batches(_BATCH, columns=[columns.image]):
                    for content in images_of(batch, columns):
                        yield f"{file.name}:{row}", BytesIO(content or b"")
                        row += 1

    def _find(self, split: str) -> list[str]:
        """Return the paths or URLs of a split's files: a pattern, a folder, or names that begin
        with the split, as `train-00000-of-00005.parquet` does, also in `data/`.
        """
        if self.table.split:
            if split not in (*WHOLE, self.table.split):
                return []
            split = self.table.split
        if _is_pattern(self.path):
            return self._match(self.path) if split in WHOLE else []
        if self.is_local and Path(self.path).is_file():
            return [self.path] if split in WHOLE else []
        if _is_pattern(split):
            return self._match(f"{self.path}/{split}")
        if self.is_http:
            return []
        if split in WHOLE[:2]:
            return self._match(f"{self.path}/*.parquet") or self._match(
                f"{self.path}/data/*.parquet"
            )
        begins = re.compile(rf"{re.escape(split)}([-_.][^/]*)?\.parquet")
        for folder in (self.path, f"{self.path}/data"):
            found = self._match(f"{folder}/{split}/*.parquet") or [
                url
                for url in self._match(f"{folder}/*.parquet")
                if begins.fullmatch(url.rpartition("/")[2])
            ]
            if found:
                return found
        return []

    def _match(self, pattern: str) -> list[str]:
        """Return the existing files of a pattern with *, or all names of one with {000..099}."""
        folder, slash, last = pattern.rpartition("/")
        if "*" in folder or "{" in folder:
            raise UsageError(f"{pattern}: patterns belong behind the last slash ({_FLAGS})")
        if "*" not in last:
            _, names = expand("", last, _FLAGS, _SUFFIX)
            if self.is_local:
                names = [name for name in names if Path(folder, name).is_file()]
            return [f"{folder}{slash}{name}" for name in names]
        if self.is_http:
            raise UsageError(f"{pattern}: behind a URL write {{000..009}} instead of * ({_FLAGS})")
        if not self.is_local:
            system, root = _file_system(pattern)
            with _told(pattern):
                return sorted(map(system.unstrip_protocol, system.glob(root)))
        try:
            names = os.listdir(folder or slash or ".")
        except OSError:
            return []
        return [
            f"{folder}{slash}{name}" for name in sorted(names) if fnmatch.fnmatchcase(name, last)
        ]

    def _has(self, asked: str) -> str:
        if self.table.split not in ("", asked):
            return f"@{self.table.split} takes one alone"
        if _is_pattern(self.path) or self.path.endswith(_SUFFIX):
            return "it names files: give their folder, and the patterns as splits"
        found = [
            url.rpartition("/")[2]
            for folder in (self.path, f"{self.path}/data")
            for url in self._match(f"{folder}/*{_SUFFIX}")
        ]
        return f"it has {some(map(shown, found), 3)}" if found else f"it has no *{_SUFFIX}"

    def _title(self, split: str) -> str:
        split = self.table.split or split
        return f"{self.name}@{split}" if split not in WHOLE[:2] else self.name

    def _unpack(self, files: Sequence[File], labelled: bool) -> list[Path]:
        """Return an Arrow file in the cache for each Parquet file."""
        unpacked = [self._place(file) for file in files]
        where = unpacked[0].parent
        with one_at_a_time(where, f"unpacking {self.name}"):
            missing = [pair for pair in zip(files, unpacked, strict=True) if not pair[1].is_file()]
            if missing:
                log.info("unpacking %s Parquet files to %s", f"{len(missing):,}", where)
            with progress_bar(len(missing), f"unpacking {self.name}") as advance:
                for file, target in missing:
                    self._unpack_one(file, target, labelled)
                    advance(1)
        return unpacked

    def _place(self, file: File) -> Path:
        """Return the path of the Arrow file; another one when the Parquet file has changed."""
        folder, _, name = file.url.rpartition("/")
        if self.is_local:
            folder = os.path.realpath(folder)
        key = "\0".join((folder, self.table.image, self.table.label))
        digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:24]
        state = hashlib.sha256(file.state.encode()).hexdigest()[:12]
        return cache_dir() / "parquet" / digest / f"{name}-{state}.arrow"

    def _unpack_one(self, file: File, target: Path, labelled: bool) -> None:
        for old in target.parent.glob(f"{glob.escape(file.name)}-*.arrow"):
            # Of the file before it changed.
            old.unlink(missing_ok=True)
        part = target.with_suffix(".part")
        packed = target.with_suffix(".parquet")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not self.is_local:
                _download(file.url, packed, self.is_http)
            source = file.url if self.is_local else str(packed)
            _convert(source, part, self.table, file.url, labelled)
            os.replace(part, target)
        except OSError as error:
            raise EnvironmentProblem(
                f"{target.parent}: cannot be written: {error.strerror or error} ($DAD_FAST_CACHE)"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)


def open_parquet(
    argument: str, split: str, classes: ClassMap | None, max_bad_share: float
) -> ArrowSource:
    """Open the Parquet files of a split."""
    return ArrowSource(ParquetFiles(argument).part(split), classes, max_bad_share)


def _common(files: Sequence[File], found: Sequence[Columns]) -> Columns:
    """Return the columns of all files. Raises DataError for a file with others."""
    for file, columns in zip(files, found, strict=True):
        if columns != found[0]:
            raise DataError(
                f"{file.url}: its columns or classes are not those of {files[0].name}: name files of "
                f"one table ({_FLAGS})"
            )
    return found[0]


def _is_pattern(text: str) -> bool:
    return text.endswith(_SUFFIX) or "{" in text or "*" in text


def _state(path: str) -> str:
    """Return size and time of a local file; "" for a URL, whose file is not asked for again."""
    if "://" in path:
        return ""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _open(path: str, where: str = "") -> Any:
    """Open a Parquet file. Raises DataError for a damaged one."""
    parquet = import_extra("pyarrow.parquet", f"parquet:{where or path}")
    with _readable(where or path):
        return parquet.ParquetFile(path, pre_buffer=False)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn pyarrow's errors into one that names the file; those of the disk pass."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = " ".join(str(error).split())[:160]
        raise DataError(f"{where}: cannot be read as Parquet: {why}; copy it again") from error


def _convert(path: str, target: Path, table: Table, where: str, labelled: bool) -> None:
    """Write the columns of image and label of a Parquet file as an Arrow stream.

    labelled: a file without labels is an error.
    """
    pa = import_extra("pyarrow", f"parquet:{where}")
    with _open(path, where) as packed:
        schema = packed.schema_arrow
        try:
            columns = find_columns(schema, table, where)
        except DataError:
            if labelled:
                raise
            columns = find_columns(schema, table, where, labelled=False)
        kept = [name for name in columns[:2] if name]
        fields = pa.schema([schema.field(name) for name in kept], metadata=schema.metadata)
        with open(target, "wb") as file, pa.ipc.new_stream(file, fields) as stream:
            with _readable(where):
                for batch in packed.iter_batches(_BATCH, columns=kept):
                    stream.write_batch(batch.select(kept))
            file.flush()
            os.fsync(file.fileno())


def _rows_in(path: str, table: Table) -> tuple[list[Entry], Columns]:
    """Return the rows of a local Parquet file and its columns, with the mean size as theirs."""
    with _open(path) as packed:
        columns = find_columns(packed.schema_arrow, table, path)
        with _readable(path):
            batches = packed.iter_batches(columns=[columns.label])
            entries = list(rows_of(batches, columns, None))
    mean = os.stat(path).st_size // max(1, len(entries))
    return [entry._replace(size=mean) for entry in entries], columns


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL and the path in it."""
    fsspec = import_extra("fsspec.core", f"parquet:{url}")
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        raise EnvironmentProblem(f"parquet:{url}: {error} (--data-dir)") from None
    except ValueError as error:
        raise UsageError(f"parquet:{url}: {error} (--data-dir)") from None


def _download(url: str, file: Path, is_http: bool) -> None:
    """Download a file whole or not at all, in several tries."""
    if is_http:
        folder, _, name = url.rpartition("/")
        download_file(f"{folder}/{quote(name)}", file)
        return
    system, path = _file_system(url)
    pause = _PAUSE
    for left in reversed(range(_TRIES)):
        try:
            with _told(url):
                system.get_file(path, str(file))
            return
        except EnvironmentProblem as error:
            if not left:
                raise
            log.info("%s; trying again in %g s", error, pause)
            time.sleep(pause)
            pause *= 2


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Name the URL in the errors of a file system."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file ({_FLAGS})") from error
    except Exception as error:
        # Each file system has errors of its own.
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise EnvironmentProblem(
            f"{url}: cannot be read: {shown(why)}; check the network and the login (--data-dir)"
        ) from error
