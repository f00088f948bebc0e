"""Members of a tar compared with Python's tarfile, over random formats, names and damage."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dad_fast.data.sources.index import Entry, load_index, save_index
from dad_fast.data.sources.names import shown
from dad_fast.data.sources.tar_index import _group
from dad_fast.data.sources.tar_members import Member, read_members
from dad_fast.errors import DataError

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = (
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.CONTTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
LETTERS = st.characters(blacklist_characters="\0", blacklist_categories=("Cs",))
NAMES = st.one_of(
    st.text(LETTERS, min_size=1, max_size=40),
    st.lists(st.text("abcdef_ä.", min_size=1, max_size=60), min_size=1, max_size=8).map("/".join),
)
MEMBERS = st.lists(st.tuples(NAMES, st.sampled_from(KINDS), st.binary(max_size=1500)), max_size=8)
DAMAGE = st.lists(st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=20)), max_size=4)
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def listed(content: bytes) -> tuple[list[Member], bool]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return read_members(file.fileno(), "x.tar")


def build(members, format):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if info.isreg():
                info.size = len(content)
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "t" * 150 if format != tarfile.USTAR_FORMAT else "t"
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:
                pass  # a name that the format cannot hold
    return out.getvalue()


@given(MEMBERS, st.sampled_from(FORMATS))
@quick
def test_members_are_those_that_tarfile_sees(members, format):
    content = build(members, format)
    found, whole = listed(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        theirs = [
            (info.name, info.isreg(), info.offset_data, info.size if info.isreg() else 0)
            for info in tar
        ]
    ours = [
        (member.name.rstrip("/"), member.kind == "file", member.offset, member.size)
        for member in found
    ]
    assert whole and ours == [(name.rstrip("/"), *rest) for name, *rest in theirs]


@given(MEMBERS, st.sampled_from(FORMATS), DAMAGE, st.data())
@quick
def test_damage_is_a_data_error_or_members_inside_the_file(members, format, damage, data):
    content = bytearray(build(members, format))
    for place, wrong in damage:
        content[place % len(content) : place % len(content) + len(wrong)] = wrong
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        found, _ = listed(bytes(content))
    except DataError as error:
        assert str(error).startswith("x.tar: ") and str(error).isprintable()
    else:
        assert all(
            member.offset >= 0 and member.size >= 0 and member.offset + member.size <= len(content)
            for member in found
        )


def test_a_member_of_more_than_eight_gigabytes():
    """GNU's binary size and pax's record, in files with a hole."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.bin")
        info.size = 9 << 30
        head = info.tobuf(format)
        with tempfile.TemporaryFile() as file:
            file.write(head)
            file.seek(len(head) + info.size)
            file.write(build([("a.jpg", tarfile.REGTYPE, b"abc")], format))
            file.flush()
            found, whole = read_members(file.fileno(), "x.tar")
            assert whole and [(m.name, m.size) for m in found] == [
                ("big.bin", 9 << 30),
                ("a.jpg", 3),
            ]
            assert os.pread(file.fileno(), 3, found[1].offset) == b"abc"


def test_concatenated_tars_end_at_the_first_end_mark():
    one = build([("a.jpg", tarfile.REGTYPE, b"abc")], tarfile.PAX_FORMAT)
    assert listed(one + one) == listed(one)


@given(
    st.permutations(
        [
            (key, kind)
            for key in ("a", "b/a", "c")
            for kind in ("jpg", "cls", "json", "txt", "seg.png")
        ]
    )
)
@quick
def test_grouping_does_not_depend_on_what_lies_between(order):
    members = [Member(f"{key}.{kind}", "file", i * 1024, 1) for i, (key, kind) in enumerate(order)]
    samples = _group(members, "x.tar")
    assert list(samples.images) == [key for key, kind in order if kind == "jpg"]
    assert {key: set(found) for key, found in samples.labels.items()} == {
        key: {"cls", "json"} for key in ("a", "b/a", "c")
    }
    assert all(image.name == f"{key}.jpg" for key, image in samples.images.items())


@given(st.lists(st.tuples(NAMES, st.integers(0, 2**62), st.booleans(), NAMES), max_size=6))
@quick
def test_an_index_holds_any_name(rows):
    entries = [
        Entry(path, "7", number, number, number, 1, 2, error, not flag, error)
        for path, number, flag, error in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.csv"
        assert save_index(file, "a shard 'ä' of 1 bytes", entries)
        assert (
            load_index(file, "a shard 'ä' of 1 bytes") == entries
            and load_index(file, "bytes") == []
        )


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
@quick
def test_shown_names_are_printable_and_differ(names):
    texts = [shown(name) for name in names]
    assert all(text.isprintable() for text in texts) and texts[0] != texts[1]
