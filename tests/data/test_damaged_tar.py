"""Damaged and hostile shards: no member's name is trusted, and every bad shard is a clear line."""

from __future__ import annotations

import gzip
import logging
import os
import tarfile

import pytest
from PIL import Image
from shards import one_shard, picture, sample, write_shards, write_tar

from dad_fast.data.sources.decode import DecodeError
from dad_fast.data.sources.registry import open_source
from dad_fast.data.sources.tar import TarSource
from dad_fast.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("cache")


def test_member_names_are_never_trusted(tmp_path):
    """Absolute, climbing and undecodable names are read from the tar only and shown as escapes."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(200, size=(3, 3)))
    names = [
        str(secret.with_suffix("")),
        "../secret",
        "a/../../secret",
        "x\x1b[31m\n",
        "y\udcff",
        "z" * 300,
        "q\\n",
    ]
    source = one_shard(
        tmp_path,
        [m for i, name in enumerate(names) for m in sample(name, i % 2, i)],
        encoding="utf-8",
    )
    assert (
        len(source) == 2 + len(names)
        and source.ok.all()
        and not {3} & set(source.sizes[:, 0].tolist())
    )
    assert [source.encoded(2 + i) for i in range(len(names))] == [
        picture(i) for i in range(len(names))
    ]
    assert (
        all(key.isprintable() for key in source.keys)
        and source.keys[5] == r"one.tar:x\x1b[31m\n.jpg"
        and r"q\\n" in source.keys[8]
    )
    again = TarSource(tmp_path, ["one.tar"])
    assert list(again.keys) == list(source.keys) and again.fingerprint == source.fingerprint


def special(name, kind, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def test_links_and_devices_are_bad_images_and_are_not_followed(tmp_path):
    (tmp_path / "target.jpg").write_bytes(picture(1))
    members = [
        special("soft.jpg", tarfile.SYMTYPE, linkname=str(tmp_path / "target.jpg")),
        special("hard.jpg", tarfile.LNKTYPE, linkname="good0.jpg"),
        special("device.jpg", tarfile.CHRTYPE, devmajor=1, devminor=5),
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("dir.jpg", tarfile.DIRTYPE),
        ("none.jpg", picture(3)),
    ]
    with pytest.raises(
        DataError,
        match="5 of 7 images cannot be read: one.tar:soft.jpg .a link, which is not followed",
    ) as caught:
        one_shard(tmp_path, members)
    assert "one.tar:device.jpg (no regular file)" in str(
        caught.value
    ) and "one.tar:none.jpg (no .cls and no .json" in str(caught.value)


def test_bad_labels_are_bad_images(tmp_path):
    labels = [b"-1", b"x", b"", b"1 2", b"9" * 70, b"1.0", b"\x1b[31m"]
    jsons = [
        b"{",
        b"[]",
        b"{}",
        b'{"label": "1"}',
        b'{"label": true}',
        b'{"label": -1}',
        b"[" * 100_000,
    ]
    jsons.append(b'{"label": 1' + b"0" * 5000 + b"}")
    members = [
        m for i, text in enumerate(labels) for m in ((f"c{i}.jpg", picture(i)), (f"c{i}.cls", text))
    ]
    members += [
        m for i, text in enumerate(jsons) for m in ((f"j{i}.jpg", picture(i)), (f"j{i}.json", text))
    ]
    path = write_tar(tmp_path / "one.tar", [*sample("good0", 0), *sample("good1", 1), *members])
    source = TarSource(tmp_path, [path.name], max_bad_share=0.99)
    assert (
        source.ok.tolist() == [True, True] + [False] * 15
        and source.labels.tolist() == [0, 1] + [0] * 15
    )
    with pytest.raises(
        DataError,
        match=r"15 of 17 images.*: one.tar:c0.jpg \(its .cls is b'-1', which is no class number\)",
    ) as caught:
        TarSource(tmp_path, [path.name])
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_bad_images_are_named(tmp_path, caplog):
    members = [
        ("bad.jpg", picture(1)[:200]),
        ("bad.cls", b"1"),
        ("empty.png", b""),
        ("empty.cls", b"0"),
    ]
    with caplog.at_level(logging.WARNING):
        source = one_shard(tmp_path, members)
    assert source.ok.tolist() == [True, True, False, False]
    assert "one.tar:bad.jpg (" in caplog.text and "one.tar:empty.png (not an image)" in caplog.text
    with pytest.raises(DecodeError, match="one.tar:bad.jpg: "):
        source.read(2)
    assert source.encoded(2) is None


def test_truncated_shards_keep_whole_members(tmp_path, caplog):
    path = write_tar(
        tmp_path / "whole.tar",
        [m for i in range(3) for m in ((f"{i}.cls", b"%d" % i), (f"{i}.jpg", picture(i)))],
    )
    content = path.read_bytes()
    last = content.rindex(b"2.jpg")
    for length, num, words in (
        (last + 512 + 100, 3, "whole.tar:2.jpg (the shard ends within it)"),
        (last + 100, 2, "whole.tar ends without a tar's end mark"),
        (last, 2, "whole.tar ends without a tar's end mark"),
    ):
        path.write_bytes(content[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = TarSource(tmp_path, ["whole.tar"], max_bad_share=0.5)
        assert (
            len(source) == num
            and source.ok.tolist() == [True, True, False][:num]
            and words in caplog.text
        )


def header(**fields):
    """Make a ustar header with a correct checksum for any fields."""
    block = bytearray(tarfile.TarInfo(fields.pop("name", "x.jpg")).tobuf(tarfile.USTAR_FORMAT))
    places = {"size": 124, "kind": 156, "magic": 257, "prefix": 345, "extended": 482}
    for field, value in fields.items():
        block[places[field] : places[field] + len(value)] = value
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    return bytes(block)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (header(size=b"\xff" * 12), "no number where one belongs"),
        (header(size=b"-0000000001\0"), "no number where one belongs"),
        (header(size=b"0x10 \0"), "no number where one belongs"),
        (header()[:100] + b"garbage" + header()[107:], "checksum is wrong"),
        (os.urandom(512).replace(b"\0", b"x"), "damaged at byte"),
        (header(kind=b"L", size=b"00010000000\0") + bytes(1 << 22), "a header of 2,097,152 bytes"),
        (
            header(kind=b"x", size=b"00000000012\0") + b"99 path=x\n".ljust(512, b"\0"),
            "pax header is damaged",
        ),
        (
            header(kind=b"x", size=b"00000000012\0") + b"10 size=-\n".ljust(512, b"\0"),
            "pax header has the size -",
        ),
        (
            header(kind=b"x", size=b"00000000012\0") + b"0 path=xx\n".ljust(512, b"\0"),
            "pax header is damaged",
        ),
    ],
)
def test_damaged_headers_raise(tmp_path, block, message):
    path = write_tar(tmp_path / "one.tar", sample("good", 0))
    content = path.read_bytes()
    end = content.rindex(b"good.cls") + 1024
    path.write_bytes(content[:end] + block + content[end:])
    with pytest.raises(
        DataError, match=f"^one.tar: damaged at byte {end:,}: .*{message}|{message} {end:,}"
    ) as caught:
        TarSource(tmp_path, ["one.tar"])
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


def test_sizes_beyond_the_end_are_refused(tmp_path):
    path = write_tar(tmp_path / "one.tar", sample("good", 0))
    content = path.read_bytes()
    end = content.rindex(b"good.cls") + 1024
    for block in (
        header(size=b"77777777777\0"),
        header(size=b"\x80" + b"\xff" * 11),
        header(kind=b"L", size=b"77777777777\0"),
    ):
        path.write_bytes(content[:end] + block + content[end:])
        source = TarSource(tmp_path, ["one.tar"], max_bad_share=0.5)
        assert source.ok.tolist() in ([True, False], [True]) and source.read(0).size == (12, 10)


def test_sparse_members_are_bad_and_later_members_are_read(tmp_path, caplog):
    """An old GNU sparse member whose map continues in two more blocks, then a good sample."""
    path = write_tar(tmp_path / "one.tar", sample("good", 0))
    content = path.read_bytes()
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    sparse = (
        header(name="s.jpg", kind=b"S", magic=b"ustar  \0", size=b"00000001000\0", extended=b"\1")
        + maps
        + bytes(512)
    )
    path.write_bytes(sparse + content)
    with caplog.at_level(logging.WARNING):
        source = TarSource(tmp_path, ["one.tar"], max_bad_share=0.5)
    assert (
        source.ok.tolist() == [False, True]
        and "one.tar:s.jpg (stored as a sparse file" in caplog.text
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*sample("a", 0), *sample("a", 1)], "a.jpg and a.jpg"),
        ([*sample("a", 0), ("a.PNG", picture(1, "PNG"))], "a.jpg and a.PNG"),
        ([*sample("a", 0), *sample("b", 0), ("a.cls", b"1")], "a.cls and a.cls"),
        ([*sample("a\x1b", 0), *sample("a\x1b", 1)], r"a\\x1b.jpg and a\\x1b.jpg"),
    ],
)
def test_ambiguous_samples_raise(tmp_path, members, message):
    with pytest.raises(DataError, match=f"one.tar: two members for one sample, {message}"):
        one_shard(tmp_path, members)


def test_shards_without_images_are_skipped_with_a_warning(tmp_path, caplog):
    """WebDataset's ShardWriter may leave an empty shard."""
    write_tar(tmp_path / "full.tar", [*sample("a", 0), *sample("b", 1)])
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "labels.tar", [("c.cls", b"1")])
    names = ["empty.tar", "full.tar", "labels.tar"]
    # Also when the index of the full shard exists.
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = TarSource(tmp_path, names)
        assert len(source) == 2 and source.read(1).size == (12, 10)
        assert [text.split(":")[0] for text in caplog.messages] == ["empty.tar", "labels.tar"]
        assert all(text.endswith("this shard is skipped") for text in caplog.messages)
    with pytest.raises(DataError, match="empty.tar: no images in it"):
        TarSource(tmp_path, ["empty.tar", "labels.tar"])


def test_unlabelled_class_numbers_are_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        write_tar(tmp_path / "one.tar", [*sample("a", 1), *sample("b", 2)])
        TarSource(tmp_path, ["one.tar"])
    assert "no image has class 0; class numbers begin at 0" in caplog.text


def test_unusable_shards_are_refused(tmp_path):
    write_shards(tmp_path / "data", num=1)
    good = (tmp_path / "data" / "train-000000.tar").read_bytes()
    (tmp_path / "zip.tar").write_bytes(gzip.compress(good))
    (tmp_path / "text.tar").write_text("<html>" * 500)
    (tmp_path / "short.tar").write_text("x")
    (tmp_path / "empty.tar").write_bytes(b"")
    write_tar(tmp_path / "dots.tar", [("a.b.jpg", picture(1)), ("a.b.cls", b"1")])
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train-0.tar.gz").write_bytes(gzip.compress(good))
    both = write_shards(tmp_path / "folders")
    Image.new("RGB", (4, 4)).save((both / "ape").mkdir() or both / "ape" / "x.png")
    assert len(open_source(str(both))) == 1  # an image folder in which tars lie
    cases = [
        (("zip.tar",), DataError, "zip.tar: compressed with gzip.*gunzip"),
        (("text.tar",), DataError, "text.tar: not a tar"),
        (("short.tar",), DataError, "short.tar: no images in it.*nothing"),
        (("empty.tar",), DataError, "empty.tar: no images in it.*nothing"),
        (("dots.tar",), DataError, "no images in it.*after the first dot.*it has b.cls, b.jpg"),
        (("packed",), DataError, "compressed .train-0.tar.gz.*decompress"),
        (("data/train-{000000..000002}.tar",), DataError, "2 of 3 shards are missing"),
        (("data/train-000000.tar", "train"), UsageError, "has no split 'train': give its folder"),
        (
            ("data", "val"),
            DataError,
            r"no folder 'val'; it has none; its 1 shards.*'train-\{000000..000000\}.tar'",
        ),
        (("data", "train-{a..b}.tar"), UsageError, "one range of numbers"),
        (("data", "train-{0..9.tar"), UsageError, "one range of numbers"),
        (("data", "train-{5..2}.tar"), UsageError, "names 0 shards"),
        (("data", "train-{0..999999999999}-{0..9}.tar"), UsageError, "1 to 1,000,000"),
        (("data", "train-{0..1}"), UsageError, "ends in .tar"),
    ]
    for (data_dir, *split), error, message in cases:
        with pytest.raises(error, match=message) as caught:
            open_source(str(tmp_path / data_dir), *split)
        assert "\n" not in str(caught.value), message
