"""Data sources by name: built-in ones, those of other packages, and messages for unknown names."""

from __future__ import annotations

from pathlib import Path

import pytest

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.embedded import EmbeddedSource
from dad_fast.data.sources.registry import SOURCES, is_named, open_source
from dad_fast.errors import DataError, UsageError
from tests.shards import write_shards

CALLS: list[tuple[object, ...]] = []


def factory(
    argument: str, split: str, classes: ClassMap | None, max_bad_share: float
) -> EmbeddedSource:
    CALLS.append((argument, split, classes, max_bad_share))
    return EmbeddedSource(split)


def test_a_factory_of_a_module_gets_argument_split_classes_and_share() -> None:
    CALLS.clear()
    name = f"python:{__name__}:factory"
    assert len(open_source(f"{name}:a:b", "val", max_bad_share=0.2)) == 500
    assert len(open_source(name, "test")) == 1000
    assert CALLS == [("a:b", "val", None, 0.2), ("", "test", None, 0.01)]


def test_folders_and_shards_open_by_name(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards" / "train").parent
    by_name, by_path = open_source(f"tar:{shards}", "train"), open_source(str(shards), "train")
    assert by_name.fingerprint == by_path.fingerprint
    with pytest.raises(DataError, match="no shards"):
        open_source(f"tar:{tmp_path}")
    with pytest.raises(DataError, match="no folder 'val'"):
        open_source(f"folder:{shards}", "val")


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert list(SOURCES)[:5] == ["csv", "embedded", "folder", "hfds", "http"]
    with pytest.raises(UsageError, match="--data-dir embeded: no such data source; did you mean"):
        open_source("embeded:digits", "train")


def test_paths_are_not_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    assert not any(map(is_named, ("a:b", "/data/a:b", "data/train-{00..12}.tar", "c:", "photos")))
    assert all(map(is_named, ("embedded:digits", "python:m:f", "other:thing", "folder:/a")))
