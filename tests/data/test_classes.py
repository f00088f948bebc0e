"""The class list: order, round trips, and errors that name the file and the fix."""

from __future__ import annotations

import os

import pytest

from dad_fast.data.classes import ClassMap, readable_names
from dad_fast.errors import DataError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_fixes_the_class_order(tmp_path):
    classes = ClassMap.from_csv(
        write(tmp_path / "c.csv", "folder,name,id\nzebra,a zebra,0\nape,an ape,2\ncat,a cat,1\n")
    )
    assert classes.folders == ["zebra", "cat", "ape"]
    assert classes.names == ["a zebra", "a cat", "an ape"]
    assert list(classes) == [(0, "zebra", "a zebra"), (1, "cat", "a cat"), (2, "ape", "an ape")]


def test_numeric_folders_keep_the_listed_order(tmp_path):
    """The authors' code sorted folders 0, 1, 10 … as strings: 12 of 1000 labels survived."""
    rows = "".join(f"{i},{i},class {i}\n" for i in range(120))
    classes = ClassMap.from_csv(write(tmp_path / "c.csv", "id,folder,name\n" + rows))
    assert classes.folders == [str(i) for i in range(120)]


def test_folders_are_sorted_and_json_round_trips(tmp_path):
    for name in ("b_b", "a", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "file.jpg").write_bytes(b"")
    classes = ClassMap.from_folders(tmp_path)
    assert classes.entries == ((0, "a", "a"), (1, "b_b", "b b"))
    assert ClassMap.from_json(classes.to_json()) == classes


def test_wnids_get_timm_names():
    pytest.importorskip("timm")
    assert readable_names(["n01440764", "n99999999", "my_class"]) == [
        "tench",
        "n99999999",
        "my class",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,folder\n0,a\n", "no column name"),
        ("id,folder,name\n", "empty"),
        ("id,folder,name\n0,a,x\n2,b,y\n", "ids 0 to 1"),
        ("id,folder,name\n0,a,x\n0,b,y\n", "ids 0 to 1"),
        ("id,folder,name\n0,a,x\n1,a,y\n", "twice"),
        ("id,folder,name\n0,a,x\none,b,y\n", "line 3"),
        ("id,folder,name\n0,a\n", "line 2"),
    ],
)
def test_errors_name_the_file(tmp_path, text, message):
    path = write(tmp_path / "c.csv", text)
    with pytest.raises(DataError, match=message) as caught:
        ClassMap.from_csv(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_invalid_class_lists_are_refused(tmp_path):
    with pytest.raises(DataError, match="no class map"):
        ClassMap.from_csv(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"binary\.csv"):
        ClassMap.from_csv(tmp_path / "binary.csv")
    with pytest.raises(DataError, match="no class folders"):
        ClassMap.from_folders(tmp_path)
    with pytest.raises(DataError, match="recorded class list"):
        ClassMap.from_json("[1, 2]")


def test_folders_that_are_not_utf8_round_trip(tmp_path):
    """A run would otherwise end with an error when its model is saved."""
    for name in (b"\xff\xfe", "ä".encode()):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    classes = ClassMap.from_folders(tmp_path)
    assert ClassMap.from_json(classes.to_json().encode().decode()) == classes
