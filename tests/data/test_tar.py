"""WebDataset shards: same behaviour as image folders, indexes per shard, and workers."""

from __future__ import annotations

import json
import logging
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import picture, sample, write_shards, write_tar

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.choose import train_loader
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources import index as indexing
from dad_fast.data.sources import pool, tar_index
from dad_fast.data.sources.decode import DecodeError
from dad_fast.data.sources.folder import FolderSource
from dad_fast.data.sources.registry import open_source
from dad_fast.data.sources.tar import TarSource
from dad_fast.errors import DataError

pytestmark = pytest.mark.usefixtures("cache")


def test_a_folder_of_shards(tmp_path):
    source = open_source(str(write_shards(tmp_path / "data" / "train").parent), "train")
    assert len(source) == 12 and source.keys[4] == "train-000001.tar:0010.jpg"
    assert source.labels.tolist() == [i % 5 for i in range(12)] and source.labels.dtype == np.int64
    assert source.classes.entries == tuple((i, str(i), str(i)) for i in range(5))
    assert (
        source.sizes.tolist() == [[12, 10]] * 12
        and source.sizes.dtype == np.int32
        and source.ok.all()
    )
    assert source.read(1).mode == "RGB" and abs(source.read(1).getpixel((0, 0))[0] - 10) < 3
    assert source.encoded(1) == picture(10)
    assert "12 images of 5 classes in 3 shards" in source.describe()
    again = pickle.loads(pickle.dumps(source))
    assert again.encoded(11) == source.encoded(11) and again.fingerprint == source.fingerprint


def test_patterns_name_the_same_shards(tmp_path):
    write_shards(tmp_path / "data")
    by_folder = open_source(str(tmp_path / "data"))
    by_split = open_source(str(tmp_path / "data"), "train-{000000..000002}.tar")
    by_path = open_source(f"{tmp_path}/data/train-{{000000..000002}}.tar")
    assert by_folder.fingerprint == by_split.fingerprint == by_path.fingerprint
    assert len(open_source(str(tmp_path / "data"), "train-000001.tar")) == 4
    assert (
        list(open_source(str(tmp_path), "data/train-{000001..000002}.tar").keys)
        == list(by_folder.keys)[4:]
    )


def test_a_copy_elsewhere_has_the_same_fingerprint_and_other_labels_have_not(tmp_path):
    here = TarSource(write_shards(tmp_path / "a"), ["train-000000.tar"])
    there = TarSource(write_shards(tmp_path / "b" / "c"), ["train-000000.tar"])
    assert here.fingerprint == there.fingerprint
    write_tar(
        tmp_path / "d" / "train-000000.tar",
        [m for i in range(4) for m in sample(f"000{i}", 4 - i, 10 * i)],
    )
    assert TarSource(tmp_path / "d", ["train-000000.tar"]).fingerprint != here.fingerprint


@pytest.mark.parametrize("loader", ["pil", "dali"])
def test_a_folder_and_its_tar_give_the_same_training(tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    for c, label in enumerate(("ape", "cat")):
        (tmp_path / "folder" / label).mkdir(parents=True)
        for i in range(6):
            kind = ("JPEG", "PNG")[i % 2]
            name = f"{i}.{kind.lower()}"
            (tmp_path / "folder" / label / name).write_bytes(
                picture(40 * c + i, kind, (20 + i, 30 - i))
            )
    (tmp_path / "folder" / "cat" / "3.png").write_bytes(b"no picture")
    folder = FolderSource(tmp_path / "folder", max_bad_share=0.2)
    files = [
        (f"{i:02d}" + Path(key).suffix, (tmp_path / "folder" / key).read_bytes())
        for i, key in enumerate(folder.keys)
    ]
    labels = [(f"{i:02d}.cls", str(label).encode()) for i, label in enumerate(folder.labels)]
    write_tar(
        tmp_path / "tars" / "0.tar",
        [m for pair in zip(files[:7], labels, strict=False) for m in pair],
    )
    write_tar(
        tmp_path / "tars" / "1.tar",
        [m for pair in zip(labels[7:], files[7:], strict=True) for m in pair],
    )
    tars = open_source(str(tmp_path / "tars"), classes=folder.classes, max_bad_share=0.2)
    assert np.array_equal(tars.labels, folder.labels) and np.array_equal(tars.sizes, folder.sizes)
    assert np.array_equal(tars.ok, folder.ok) and tars.classes == folder.classes and not tars.ok[9]
    assert [tars.encoded(i) for i in range(12)] == [folder.encoded(i) for i in range(12)]
    aug = AugmentConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8)
    loaders = [train_loader(loader, source, aug, 16, 4, 0, 0) for source in (folder, tars)]
    assert [found.name for found in loaders] == [loader] * 2
    for a, b in zip(*(found.batches(0, 9) for found in loaders), strict=True):
        assert (
            torch.equal(a.images, b.images)
            and torch.equal(a.samples, b.samples)
            and torch.equal(a.labels, b.labels)
        )


def test_webdataset_reads_the_same(tmp_path):
    wds = pytest.importorskip("webdataset")
    samples = [
        ("a/b.c/x", "jpg", "cls"),
        ("n01/01", "JPEG", "cls"),
        ("./y", "png", "cls"),
        ("__m__x", "png", "cls"),
    ]
    samples.append(("ä b", "jpg", "json"))
    members = [
        ("__meta__.json", b"{}"),
        ("__skip__/1.jpg", picture(1)),
        ("folder/.hidden.jpg", picture(2)),
    ]
    for i, (key, kind, label) in enumerate(samples):
        content = {"cls": f" {i}\n", "json": json.dumps({"label": i, "name": "x"})}[label]
        image = picture(50 * i, "PNG" if kind == "png" else "JPEG")
        members += [
            (f"{key}.{kind}", image),
            (f"{key}.{label}", content.encode()),
            (f"{key}.txt", b"words"),
            (f"{key}.seg.png", b"mask"),
        ]
    path = write_tar(tmp_path / "peer.tar", members)
    ours = TarSource(tmp_path, ["peer.tar"])
    with open(path, "rb") as stream:
        raw = list(
            wds.tariterators.group_by_keys(
                wds.tariterators.tar_file_expander([{"url": "peer.tar", "stream": stream}])
            )
        )
    theirs = []
    for found in raw:
        image = (
            next(found[kind] for kind in ("jpg", "jpeg", "png") if kind in found)
            if {"jpg", "jpeg", "png"} & set(found)
            else None
        )
        label = (
            int(found["cls"])
            if "cls" in found
            else json.loads(found.get("json", "{}")).get("label")
        )
        if image is not None and label is not None:
            theirs.append((found["__key__"], label, image))
    keys = [tar_index._KEY.fullmatch(key.partition(":")[2])[1] for key in ours.keys]
    contents = [ours._content(i) for i in range(len(ours))]
    assert list(zip(keys, ours.labels.tolist(), contents, strict=True)) == theirs and len(
        theirs
    ) == len(samples)


def test_shards_written_by_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(f"{tmp_path}/wds-%04d.tar", maxcount=3, verbose=0) as sink:
        for i in range(8):
            sink.write(
                {
                    "__key__": f"sample{i:05d}",
                    "png": np.full((6, 7, 3), i, np.uint8),
                    "cls": i % 2,
                    "json": {"label": 1 - i % 2},
                }
            )
    source = open_source(str(tmp_path), "wds-{0000..0002}.tar")
    assert source.labels.tolist() == [0, 1] * 4 and [
        source.read(i).getpixel((0, 0)) for i in range(8)
    ] == [(i, i, i) for i in range(8)]
    assert source.keys[3] == "wds-0001.tar:sample00003.png" and source.encoded(3) is None


def test_labels_come_from_cls_or_json_and_keep_numerical_order(tmp_path):
    members = []
    for label in range(11, -1, -1):
        text = (
            (f"{label}.json", json.dumps({"label": label}).encode())
            if label % 2
            else (f"{label}.cls", f"{label}\n".encode())
        )
        members += [(f"{label}.PNG", picture(label, "PNG")), text]
    source = TarSource(write_tar(tmp_path / "x.tar", members).parent, ["x.tar"])
    assert source.labels.tolist() == list(range(11, -1, -1)) and source.classes.names == [
        str(i) for i in range(12)
    ]


def test_class_lists_fix_the_classes_of_shards(tmp_path):
    write_shards(tmp_path / "data")
    (tmp_path / "map.csv").write_text(
        "id,folder,name\n" + "".join(f"{i},n{i:02d},class {i}\n" for i in range(7))
    )
    source = open_source(str(tmp_path / "data"), class_map=str(tmp_path / "map.csv"))
    assert (
        source.labels.tolist() == [i % 5 for i in range(12)]
        and source.classes.names[6] == "class 6"
    )
    few = ClassMap(((0, "a", "a"), (1, "b", "b")))
    with pytest.raises(
        DataError, match=r"class 4 is not in the class list, which has 0 to 1 \(--class-map\)"
    ):
        open_source(str(tmp_path / "data"), classes=few)
    write_tar(tmp_path / "far" / "x.tar", [*sample("a", 0), *sample("b", 999_999_999, 5)])
    with pytest.raises(
        DataError, match=r"go to 999,999,999, but only 2 classes have images.*--class-map"
    ):
        open_source(str(tmp_path / "far"))


def count_verified(monkeypatch):
    verified = []
    original = indexing._verify
    monkeypatch.setattr(
        indexing,
        "_verify",
        lambda entry, content: verified.append(entry.path) or original(entry, content),
    )
    return verified


def test_only_a_changed_shard_is_read_again(tmp_path, monkeypatch):
    write_shards(tmp_path / "data")
    first = open_source(str(tmp_path / "data"))
    verified = count_verified(monkeypatch)
    assert open_source(str(tmp_path / "data")).fingerprint == first.fingerprint and verified == []
    write_tar(tmp_path / "data" / "train-000001.tar", [*sample("x", 3), *sample("y", 4)])
    os.utime(tmp_path / "data" / "train-000002.tar", ns=(1, 1))
    second = open_source(str(tmp_path / "data"))
    assert (
        sorted(verified) == ["0020.jpg", "0021.jpg", "0022.jpg", "0023.jpg", "x.jpg", "y.jpg"]
        and len(second) == 10
    )
    with pytest.raises(
        DecodeError,
        match=r"train-000001\.tar:0010\.jpg: the shard has changed since it was indexed",
    ):
        pickle.loads(pickle.dumps(first)).read(4)
    assert first.encoded(4) is None


def test_an_interrupted_build_keeps_the_shards_that_it_verified(tmp_path, monkeypatch):
    write_shards(tmp_path / "data")
    original = indexing._verify

    def interrupted(entry, content):
        if entry.path == "0022.jpg":
            raise KeyboardInterrupt
        return original(entry, content)

    monkeypatch.setattr(pool, "usable_cores", lambda: 1)
    monkeypatch.setattr(indexing, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source(str(tmp_path / "data"))
    monkeypatch.setattr(indexing, "_verify", original)
    verified = count_verified(monkeypatch)
    assert len(open_source(str(tmp_path / "data"))) == 12 and verified == [
        "0020.jpg",
        "0021.jpg",
        "0022.jpg",
        "0023.jpg",
    ]


def test_a_damaged_index_is_made_again(tmp_path, cache, monkeypatch):
    write_shards(tmp_path / "data", num=1)
    first = open_source(str(tmp_path / "data"))
    (file,) = (cache / "index").glob("*.csv")
    content = file.read_bytes()
    for damaged in (content[:-20], b"", content.replace(b"train-000000", b"train-000001")):
        file.write_bytes(damaged)
        assert (
            open_source(str(tmp_path / "data")).fingerprint == first.fingerprint
            and file.read_bytes() == content
        )


def test_few_files_are_open_at_once_and_threads_read_through_the_change(tmp_path, monkeypatch):
    source = open_source(str(write_shards(tmp_path / "data", num=6, per_shard=2)))
    tar_index._open_shard.cache_clear()
    small = tar_index.lru_cache(maxsize=2)(tar_index._Open)
    monkeypatch.setattr(tar_index, "_open_shard", small)
    descriptors = []

    def read(i):
        content = source.encoded(i % 12)
        if threading.current_thread() is not threading.main_thread() and not i % 40:
            descriptors.append(len(os.listdir("/proc/self/fd")))
        return content == picture(10 * (i % 12 % 5))

    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(2000)))
    assert max(descriptors) - before <= 2 + 8 + 2
    small.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_forked_and_spawned_workers_read_shards(tmp_path):
    source = open_source(str(write_shards(tmp_path / "data", num=6, per_shard=4)))
    here = [b.images for b in TrainLoader(source, AugmentConfig(), 8, 4, 0, 0).batches(0, 8)]
    there = [b.images for b in TrainLoader(source, AugmentConfig(), 8, 4, 0, 2).batches(0, 8)]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    pid = os.fork()
    if pid == 0:
        os._exit(0 if source.encoded(5) == picture(0) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_evaluation_suites_can_be_shards(tmp_path):
    pytest.importorskip("timm")
    from dad_fast.config.schema import DataConfig
    from dad_fast.evaluation.runner import open_suites

    write_shards(tmp_path / "data" / "val")
    write_shards(tmp_path / "other", name="sketch-{}.tar")
    classes = ClassMap(tuple((i, f"n{i}", f"class {i}") for i in range(5)))
    names = [
        "val",
        "val/train-{000001..000002}.tar",
        f"{tmp_path}/other",
        f"{tmp_path}/other/sketch-{{0..1}}.tar",
    ]
    suites = open_suites(names, DataConfig(data_dir=str(tmp_path / "data")), classes)
    assert [len(suite.source) for suite in suites] == [12, 8, 12, 8] and all(
        suite.source.classes == classes for suite in suites
    )
    with pytest.raises(DataError, match="no corruption"):
        open_suites(["sketch-{0..1}.tar"], DataConfig(data_dir=str(tmp_path / "data")), classes)


def test_an_unwritable_cache_is_logged_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(write_shards(tmp_path / "data")))) == 12
    assert caplog.text.count("are not kept") == 1 and "indexes of 3 shards" in caplog.text
