"""WebDataset shards: tars of (image, class number) samples, read at random through an index.

Nothing is extracted. The shards are all `*.tar` of a folder, sorted by name, or those of a pattern:
`train-{000000..000099}.tar`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.decode import DecodeError, read_rgb, reason
from dad_fast.data.sources.index import Entry, files_of, report_bad, report_few_bits
from dad_fast.data.sources.names import PackedStrings, shown, some
from dad_fast.data.sources.tar_index import Shard, build_tar_index, read_bytes
from dad_fast.errors import DataError, UsageError

log = logging.getLogger("dad_fast.data")

_MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class ShardSource:
    """Images that lie in larger files, each at an offset, in the order of the files.

    The fingerprint covers keys, sizes, labels and readability, not mtimes: a copy has the same one.
    """

    shards = "shards"  # in the log
    classes: ClassMap

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        found: Sequence[Sequence[Entry]],
        keys: Sequence[str],
        max_bad_share: float,
    ) -> None:
        """found: the verified entries of each shard. keys: of the images of all shards.

        Whoever inherits sets `labels` and `classes`.
        """
        self.name = name
        self.max_bad_share = max_bad_share
        self._shards = list(shards)
        self.keys = keys
        entries = [entry for part in found for entry in part]
        self.labels = np.zeros(len(entries), dtype=np.int64)
        self.sizes = np.array([(entry.width, entry.height) for entry in entries], dtype=np.int32)
        self.ok = np.array([entry.ok for entry in entries], dtype=bool)
        self._shard_of = np.repeat(
            np.arange(len(found), dtype=np.int32), [len(part) for part in found]
        )
        self._offsets = np.array([entry.offset for entry in entries], dtype=np.int64)
        self.files = files_of(entries, keys.__getitem__)
        report_bad(name, self.files.bad, len(entries), max_bad_share)
        report_few_bits(name, self.files)
        digest = hashlib.sha256()
        for key, entry in zip(keys, entries, strict=True):
            line = f"{key}\0{entry.size}\0{entry.label}\0{entry.ok}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        try:
            content = self._content(index)
        except OSError as error:
            raise DecodeError(f"{self.keys[index]}: {reason(error)}") from error
        return read_rgb(BytesIO(content), self.keys[index])

    def encoded(self, index: int) -> bytes | None:
        try:
            return self._content(index) if self.files.plain_jpeg(index) else None
        except OSError:
            return None

    def describe(self) -> str:
        counts = f"{len(self):,} images of {len(self.classes):,} classes"
        text = f"{self.name}: {counts} in {len(self._shards):,} {self.shards}"
        bad = int((~self.ok).sum())
        return f"{text}, {bad:,} unreadable" if bad else text

    def _content(self, index: int) -> bytes:
        return read_bytes(
            self._shards[self._shard_of[index]],
            int(self._offsets[index]),
            int(self.files.num_bytes[index]),
        )


class TarSource(ShardSource):
    """A split of WebDataset shards, in the order of the shards and of the images in each.

    Without a class list the class numbers are their own names, from 0 to the highest.
    """

    def __init__(
        self,
        base: Path,
        names: Sequence[str],
        classes: ClassMap | None = None,
        max_bad_share: float = 0.01,
        name: str = "",
    ) -> None:
        last = f" … {names[-1]}" if len(names) > 1 else ""
        shards, found = build_tar_index(base, names)
        keys = PackedStrings(
            f"{shown(name)}:{shown(entry.path)}"
            for name, part in zip(names, found, strict=True)
            for entry in part
        )
        super().__init__(name or f"{base}/{names[0]}{last}", shards, found, keys, max_bad_share)
        labels = [int(entry.label or 0) for part in found for entry in part]
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = check_labels(self.name, self.labels[self.ok], classes)
        # Only unreadable images can have such a label.
        self.labels[self.labels >= len(self.classes)] = 0


def open_shards(
    argument: str, split: str, classes: ClassMap | None, max_bad_share: float
) -> TarSource:
    """Open the shards that a folder or pattern and a split name."""
    shards = find_shards(argument, split)
    if shards is None:
        raise DataError(f"{Path(argument) / split}: no shards (*.tar) in it (--data-dir)")
    return TarSource(*shards, classes, max_bad_share)


def find_shards(data_dir: str, split: str) -> tuple[Path, list[str]] | None:
    """Return the folder of the shards and their names in it.

    None when `data_dir` and `split` name no shards. Raises UsageError for an invalid pattern,
    DataError when a folder holds only compressed tars.
    """
    folder = Path(data_dir) / split
    if not folder.is_dir():
        if _is_pattern(split):
            return expand(data_dir, split, "--train-split, --val-split, --suite")
        if not _is_pattern(data_dir):
            return None
        if split:
            raise UsageError(
                f"{data_dir} names shards, so it has no split {split!r}: give its folder as "
                "--data-dir and the pattern as --train-split or --val-split"
            )
        return expand("", data_dir, "--data-dir")
    try:
        with os.scandir(folder) as listing:
            items = [item for item in listing if not item.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror} (--data-dir)") from error
    if any(item.is_dir() for item in items):
        return None
    files = sorted(item.name for item in items)
    names = [name for name in files if name.endswith(".tar")]
    if names:
        return folder, names
    packed = [shown(name) for name in files if name.endswith(_PACKED)]
    if packed:
        raise DataError(
            f"{folder}: its shards are compressed ({some(packed)}), "
            "so images cannot be read one by one: decompress them"
        )
    return None


def _is_pattern(text: str) -> bool:
    return text.endswith(".tar") or "{" in text


def shards_hint(folder: Path) -> str:
    """Return how to name the shards of a folder that lacks a split; empty without shards."""
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".tar"))
    if not names:
        return ""
    example = shown(re.sub(r"([0-9]+)[.]tar$", r"{\1..\1}.tar", names[0]))
    count = f"{len(names):,} shards"
    return f"; its {count} can be named by a pattern, as in --train-split '{example}'"


def expand(root: str, pattern: str, flags: str, extension: str = ".tar") -> tuple[Path, list[str]]:
    """Expand `a-{00..12}.tar` to thirteen names, with numbers as wide as the first one.

    Several ranges make all combinations.
    """
    if not pattern.endswith(extension):
        raise UsageError(f"{pattern}: a pattern of shards ends in {extension} ({flags})")
    head, *rest = re.split(_RANGE, pattern)
    firsts, lasts, afters = rest[::3], rest[1::3], rest[2::3]
    if any(brace in part for part in (head, *afters) for brace in "{}"):
        raise UsageError(
            f"{pattern}: the braces of shards hold one range of numbers, "
            f"as in train-{{000000..000099}}{extension} ({flags})"
        )
    ranges = [range(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]
    total = math.prod(map(len, ranges))
    if not 1 <= total <= _MOST_SHARDS:
        raise UsageError(
            f"{pattern}: names {total:,} shards; 1 to {_MOST_SHARDS:,} can be read ({flags})"
        )

    # Names are relative to the folder that all of them share.
    folder, slash, start = head.rpartition("/")
    names = []
    for chosen in itertools.product(*ranges):
        text = start
        for number, first, after in zip(chosen, firsts, afters, strict=True):
            text += f"{number:0{len(first)}d}{after}"
        names.append(text)
    return Path(root) / (folder + slash), names


def check_labels(name: str, labels: np.ndarray, classes: ClassMap | None) -> ClassMap:
    """Return the class list of class numbers [N], all of them ≥ 0."""
    present = np.unique(labels)
    highest = int(present[-1])
    if classes is not None:
        if highest >= len(classes):
            raise DataError(
                f"{name}: class {highest} is not in the class list, "
                f"which has 0 to {len(classes) - 1} (--class-map)"
            )
        return classes
    if len(present) * 2 < highest + 1:
        raise DataError(
            f"{name}: class numbers go to {highest:,}, but only {len(present):,} classes have "
            "images; name the classes (--class-map)"
        )
    if len(present) <= highest:
        absent = sorted(set(range(highest + 1)) - set(present.tolist()))
        log.warning(
            "%s: no image has class %s; class numbers begin at 0 (--class-map lists the classes)",
            name,
            some(map(str, absent)),
        )
    return ClassMap.numbered(highest + 1)
