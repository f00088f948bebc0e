"""The index of an image folder: built once, changed files verified again, bad files named."""

from __future__ import annotations

import io
import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources import index as indexing
from dad_fast.data.sources import pool
from dad_fast.data.sources.folder import FolderSource
from dad_fast.data.sources.names import PackedStrings
from dad_fast.data.sources.registry import open_source
from dad_fast.errors import DataError
from tests.processes import wait_until

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def tree(tmp_path):
    """Two splits of three classes with four images each; pixel values tell them apart."""
    for split in ("train", "val"):
        for c, label in enumerate(("cat", "ape", "sea_lion")):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (10 + i, 8), (50 * c, 20 * i, 0)).save(folder / f"{i}.png")
    return tmp_path / "data"


def count_verified(monkeypatch):
    verified = []
    original = indexing._verify
    monkeypatch.setattr(
        indexing,
        "_verify",
        lambda entry, content: verified.append(entry.path) or original(entry, content),
    )
    return verified


def test_a_folder_is_read_in_path_order_with_sorted_classes(tree):
    source = open_source(str(tree), "train")
    assert source.classes.entries == (
        (0, "ape", "ape"),
        (1, "cat", "cat"),
        (2, "sea_lion", "sea lion"),
    )
    assert list(source.keys)[:5] == [
        "ape/0.png",
        "ape/1.png",
        "ape/2.png",
        "ape/3.png",
        "cat/0.png",
    ]
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.sizes.tolist()[:2] == [[10, 8], [11, 8]]
    assert source.read(5).getpixel((0, 0)) == (0, 20, 0) and source.read(5).size == (11, 8)
    assert "12 images of 3 classes" in source.describe()
    assert pickle.loads(pickle.dumps(source)).keys[3] == "ape/3.png"


def test_a_class_map_fixes_labels_not_samples(tree, tmp_path):
    (tmp_path / "map.csv").write_text("id,folder,name\n0,sea_lion,sea lion\n1,cat,cat\n2,ape,ape\n")
    plain, mapped = (
        open_source(str(tree), "train"),
        open_source(str(tree), "train", str(tmp_path / "map.csv")),
    )
    assert (
        list(plain.keys) == list(mapped.keys)
        and mapped.labels.tolist() == [2] * 4 + [1] * 4 + [0] * 4
    )
    recorded = open_source(str(tree), "val", classes=mapped.classes)
    assert recorded.labels.tolist() == mapped.labels.tolist()


def test_a_second_opening_verifies_nothing_and_a_changed_file_is_verified_again(tree, monkeypatch):
    first = open_source(str(tree), "train")
    verified = count_verified(monkeypatch)
    assert open_source(str(tree), "train").fingerprint == first.fingerprint and verified == []
    Image.new("RGB", (99, 7)).save(tree / "train" / "cat" / "1.png")
    Image.new("RGB", (5, 5)).save(tree / "train" / "cat" / "9.png")
    os.utime(tree / "train" / "ape" / "0.png", ns=(1, 1))
    (tree / "train" / "ape" / "3.png").unlink()
    source = open_source(str(tree), "train")
    assert sorted(verified) == ["ape/0.png", "cat/1.png", "cat/9.png"]
    assert (
        len(source) == 12
        and source.sizes[4].tolist() == [99, 7]
        and source.fingerprint != first.fingerprint
    )


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "version"])
def test_a_damaged_index_is_made_again(tree, cache, monkeypatch, damage):
    first = open_source(str(tree), "train")
    (file,) = (cache / "index").glob("*.csv")
    content = file.read_bytes()
    damaged = {
        "cut": content[:-40],
        "flip": content.replace(b",10,8,", b",10,9,"),
        "empty": b"",
        "version": b"# dad-fast index 0\n" + content,
    }
    file.write_bytes(damaged[damage])
    verified = count_verified(monkeypatch)
    assert open_source(str(tree), "train").fingerprint == first.fingerprint
    assert len(verified) == 12 and file.read_bytes() == content


def test_an_interrupted_build_keeps_what_it_verified(tree, monkeypatch):
    monkeypatch.setattr(indexing, "_CHUNK", 1)
    monkeypatch.setattr(pool, "usable_cores", lambda: 1)
    original = indexing._verify

    def interrupted(entry, content):
        if entry.path == "cat/1.png":
            raise KeyboardInterrupt
        return original(entry, content)

    monkeypatch.setattr(indexing, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source(str(tree), "train")
    monkeypatch.setattr(indexing, "_verify", original)
    verified = count_verified(monkeypatch)
    assert len(open_source(str(tree), "train")) == 12
    assert verified == [f"cat/{i}.png" for i in (1, 2, 3)] + [f"sea_lion/{i}.png" for i in range(4)]


def test_only_one_of_several_processes_verifies(tree, monkeypatch, caplog):
    """Threads stand for processes: a lock belongs to an opened file."""
    verified, original = count_verified(monkeypatch), indexing.save_index

    def waits():
        return caplog.text.count("another process is indexing") == 2

    monkeypatch.setattr(
        indexing, "save_index", lambda *arguments: wait_until(waits) or original(*arguments)
    )
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(
                lambda _: indexing.build_index(tree / "train", ["ape", "cat", "sea_lion"]), range(3)
            )
        )
    assert found[0] == found[1] == found[2] and len(verified) == 12
    assert "another process is indexing" in caplog.text


def test_bad_files_are_named_counted_and_limited(tree, caplog):
    (tree / "train" / "cat" / "0.png").write_bytes(b"")
    (tree / "train" / "ape" / "text.jpg").write_text("<html>")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(tree, "train", max_bad_share=0.2)
    assert source.ok.sum() == 11 and len(source) == 13
    for text in ("2 of 13", "cat/0.png", "ape/text.jpg (not an image)"):
        assert text in caplog.text
    with pytest.raises(DataError, match=r"2 of 13 images cannot be read.*max_bad_share"):
        open_source(str(tree), "train")


def test_files_that_are_not_read_are_counted(tree, caplog):
    for i, name in enumerate(("a.jfif", "b.JPE", "c.mpo", "d.avif", "e.avif", "labels.csv")):
        content = io.BytesIO()
        Image.new("RGB", (20 + i, 8)).save(content, "JPEG")
        (tree / "train" / "ape" / name).write_bytes(content.getvalue())
    (tree / "train" / "stray.jpg").write_bytes(content.getvalue())
    with caplog.at_level(logging.WARNING):
        source = FolderSource(tree, "train")
    assert len(source) == 15 and source.ok.all()
    stray, others = caplog.messages
    assert stray.startswith("1 images lie in") and "are not read" in stray
    assert others.startswith("3 files in") and others.endswith(": .avif 2, .csv 1")


def test_deep_greyscale_is_checked_while_indexing(tree, caplog):
    folder = tree / "train" / "ape"
    levels = np.linspace(0, 1, 64).reshape(8, 8)
    Image.fromarray((levels * 4095).astype(np.uint16)).save(folder / "12.png")
    Image.fromarray((levels * 65535).astype(np.uint16)).save(folder / "16.png")
    Image.fromarray((levels * 200).astype(np.float32)).save(folder / "float.tif")
    for _ in range(2):  # the second time from the index
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = FolderSource(tree, "train", max_bad_share=0.1)
        bad, few_bits = caplog.messages
        assert "float.tif (float values from 0 to 200 are not in [0, 1])" in bad
        assert few_bits.startswith("1 grey images in") and "nearly black" in few_bits
    assert len(source) - int(source.ok.sum()) == 1


def test_a_repaired_file_counts_again(tree):
    (tree / "train" / "cat" / "0.png").write_bytes(b"")
    assert not FolderSource(tree, "train", max_bad_share=0.2).ok.all()
    Image.new("RGB", (10, 8)).save(tree / "train" / "cat" / "0.png")
    assert FolderSource(tree, "train").ok.all()


def test_links_loops_hidden_files_and_odd_names(tree, tmp_path):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    Image.new("RGB", (3, 3)).save(outside / "linked.png")
    ape = tree / "train" / "ape"
    (ape / "more").symlink_to(outside, target_is_directory=True)
    (ape / "loop").symlink_to(ape, target_is_directory=True)
    (ape / ".hidden.png").write_bytes(b"")
    (ape / "notes.txt").write_text("not an image")
    odd = os.fsencode(ape) + b'/n\xff,"\n.PNG'
    Image.new("RGB", (4, 4)).save(ape / "tmp.png")
    os.rename(os.fsencode(ape / "tmp.png"), odd)
    for _ in range(2):
        source = FolderSource(tree, "train")
        assert len(source) == 14 and source.ok.all() and "ape/more/linked.png" in list(source.keys)
    (ape / "nowhere.jpg").symlink_to(tmp_path / "absent.jpg")
    source = FolderSource(tree, "train", max_bad_share=0.5)
    assert len(source) == 15 and not source.ok[list(source.keys).index("ape/nowhere.jpg")]


def test_unusable_folders_are_refused(tree, tmp_path):
    classes = ClassMap(((0, "ape", "ape"), (1, "cat", "cat")))
    more = ClassMap((*FolderSource(tree, "train").classes.entries, (3, "yak", "yak")))
    (tree / "file").write_text("")
    (tree / "none").mkdir()
    cases = [
        ((tmp_path / "absent",), "no such folder"),
        ((tree / "file",), "not a folder"),
        ((tree, "test"), "no folder 'test'; it has none, train, val"),
        ((tree, "none"), "no class folders"),
        ((tree, "train", classes), "1 folders that are not in the class list: sea_lion"),
        ((tree, "train", more), "lacks 1 of the 4 listed classes: yak"),
    ]
    for arguments, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            FolderSource(*arguments)
        assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    (tree / "train" / "yak").mkdir()
    with pytest.raises(DataError, match=r"yak holds no images"):
        FolderSource(tree, "train")


def test_an_unwritable_cache_is_logged_and_ignored(tree, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(tree), "train")) == 12
    assert "is not kept" in caplog.text


def test_packed_strings_equal_a_list():
    texts = ["", "a", "bäb", "n\udcff", "last"]
    packed = PackedStrings(texts)
    assert (
        list(packed) == texts
        and packed[-1] == "last"
        and packed[1:3] == ["a", "bäb"]
        and packed[np.int64(2)] == "bäb"
    )
    with pytest.raises(IndexError):
        packed[5]


def test_encoded_gives_the_bytes_of_plain_jpegs_alone(tree):
    folder = tree / "train" / "ape"
    for mode in ("L", "RGB", "CMYK"):
        Image.new(mode, (9, 8)).save(folder / f"{mode}.jpg")
    Image.new("RGB", (9, 8)).save(folder / "rgb-stored.jpg", keep_rgb=True)
    Image.new("RGB", (9, 8)).save(folder / "progressive.jpg", progressive=True)
    Image.new("RGB", (9, 8)).save(folder / "png.jpg", format="PNG")
    Image.new("RGB", (9, 8)).save(folder / "jpeg.png", format="JPEG")
    (folder / "broken.jpg").write_bytes((folder / "RGB.jpg").read_bytes()[:300])
    for _ in range(2):  # verified, and from the index
        source = pickle.loads(pickle.dumps(FolderSource(tree, "train", max_bad_share=0.2)))
        given = {
            key: source.encoded(i)
            for i, key in enumerate(source.keys)
            if source.encoded(i) is not None
        }
        assert sorted(given) == [
            f"ape/{name}" for name in ("L.jpg", "RGB.jpg", "jpeg.png", "progressive.jpg")
        ]
        assert all(content == (tree / "train" / key).read_bytes() for key, content in given.items())
    index = list(source.keys).index("ape/RGB.jpg")
    (folder / "RGB.jpg").write_bytes(given["ape/RGB.jpg"] + b"more")
    assert source.encoded(index) is None
    (folder / "RGB.jpg").unlink()
    assert source.encoded(index) is None
