"""Data sources by name. To add one: a file with a factory, and a line here.

A factory takes the argument after the name's colon, the split, a fixed class list or None, and the
share of unreadable images above which it raises; it returns a `Source`. Other packages add
factories by an entry point in the group `dad_fast.sources` or as `python:MODULE:FACTORY`. A source
whose images can be listed without an index has a second entry in LISTINGS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dad_fast.errors import UsageError
from dad_fast.registry import PYTHON, Registry

if TYPE_CHECKING:
    from dad_fast.data.classes import ClassMap
    from dad_fast.data.sources.base import Listing, Source

Factory = Callable[[str, str, "ClassMap | None", float], "Source"]
SOURCES: Registry[Factory] = Registry("data source", "dad_fast.sources", "--data-dir")
SOURCES.add("csv", "dad_fast.data.sources.csv_list:open_csv")
SOURCES.add("embedded", "dad_fast.data.sources.embedded:open_embedded")
SOURCES.add("folder", "dad_fast.data.sources.folder:open_folder")
SOURCES.add("hfds", "dad_fast.data.sources.arrow.hfds:open_hfds")
SOURCES.add("http", "dad_fast.data.sources.http:open_http")
SOURCES.add("https", "dad_fast.data.sources.http:open_https")
SOURCES.add("parquet", "dad_fast.data.sources.arrow.parquet:open_parquet")
SOURCES.add("tar", "dad_fast.data.sources.tar:open_shards")
LISTINGS: Registry[Callable[[str], Listing]] = Registry(
    "listing of a data source", "dad_fast.listings", "--data-dir"
)
LISTINGS.add("csv", "dad_fast.data.sources.csv_list:read_csv")
LISTINGS.add("folder", "dad_fast.data.sources.folder:PathListing")
LISTINGS.add("hfds", "dad_fast.data.sources.arrow.hfds:HfDataset")
LISTINGS.add("http", "dad_fast.data.sources.http:list_http")
LISTINGS.add("https", "dad_fast.data.sources.http:list_https")
LISTINGS.add("parquet", "dad_fast.data.sources.arrow.parquet:ParquetFiles")
LISTINGS.add("tar", "dad_fast.data.sources.folder:PathListing")
# Names under which other data sets have a split.
OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation", "test")}


def open_source(
    data_dir: str,
    split: str = "",
    class_map: str = "",
    *,
    classes: ClassMap | None = None,
    max_bad_share: float = 0.01,
) -> Source:
    """Open a split of an image folder, of WebDataset shards or of a named source.

    Args:
        data_dir: a folder, a pattern of shards such as `/data/train-{000000..000099}.tar`,
            `csv:FILE`, `hfds:NAME@SPLIT`, `parquet:PATH`, `embedded:digits`, or `NAME:ARGUMENT` of
            another source of the registry.
        split: a sub-folder of it, a pattern of shards in it, or a split of a named source. Empty:
            `data_dir` itself holds the class folders or shards. A folder with shards and no
            sub-folder is read as shards.
        class_map: a CSV that fixes the classes; `classes` does the same with a recorded list.
            Without either the list is that of the folders, sorted, or for shards the class numbers.
        max_bad_share: share of unreadable images above which this raises.

    Raises:
        UsageError: no data directory is named, or no such source, embedded set or split exists.
        DataError: a missing folder or shard, a damaged shard, no images in a class, a class list
            that disagrees, or too many unreadable images.
    """
    from dad_fast.data.classes import ClassMap
    from dad_fast.data.sources.tar import find_shards

    if not data_dir:
        raise UsageError("no data: name an image folder, shards or embedded:digits (--data-dir)")
    fixed = ClassMap.from_csv(class_map) if class_map else classes
    if is_named(data_dir):
        name, argument = SOURCES.split(data_dir)
    else:
        name, argument = "tar" if find_shards(data_dir, split) else "folder", data_dir
    return SOURCES[name](argument, split, fixed, max_bad_share)


def is_named(data_dir: str) -> bool:
    """Return whether `data_dir` is NAME:ARGUMENT of a source, known or not, rather than a path."""
    if data_dir.startswith(PYTHON):
        return True
    name, colon, _ = data_dir.partition(":")
    if not colon or "/" in name or len(name) < 2:
        return False
    return name in SOURCES or not Path(data_dir).exists()


def find_listing(data_dir: str) -> Listing | None:
    """Return the listing of a path or of a named source; None for a source that has none.

    Raises DataError when the listing cannot be read.
    """
    name, argument = SOURCES.split(data_dir) if is_named(data_dir) else ("folder", data_dir)
    listing = LISTINGS.find(name)
    return None if listing is None else listing(argument)


def is_split(data_dir: str, split: str) -> bool:
    """Return whether the folder, or the first shard of a pattern, exists."""
    from dad_fast.data.sources.folder import PathListing

    return PathListing(data_dir).has_split(split)
