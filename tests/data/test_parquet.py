"""Parquet files of images: splits, columns, classes, bad rows, URLs and mistakes."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dad_fast.cli.main import main
from dad_fast.config.schema import AugmentConfig, DataConfig
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.registry import find_listing, open_source
from dad_fast.data.sources.splits import open_split
from dad_fast.data.sources.survey import survey
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from tests.data.test_http_shards import Server, server
from tests.sequences import check_sequence
from tests.shards import picture
from tests.tables import NAMES, pictures, write_parquet, write_splits
from tests.tiny import STUDENT

__all__ = ["server"]

pytest.importorskip("pyarrow")

AUG = AugmentConfig(mixup=0.8, cutmix=1.0)


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> Path:
    return write_splits(tmp_path / "set")


def test_rows_become_images_in_their_order(folder: Path, cache: Path) -> None:
    source = open_source(f"parquet:{folder}", "train")
    assert list(source.keys)[5:7] == [
        "train-00000-of-00002.parquet:5",
        "train-00001-of-00002.parquet:0",
    ]
    assert source.labels.tolist() == [i % 3 for i in range(12)]
    assert source.classes.folders == list(NAMES) and source.ok.all()
    assert source.encoded(3) == pictures(6)[3] and source.read(3).size == (23, 24)
    assert source.sizes[8].tolist() == [22, 24]
    assert source.describe().endswith("@train: 12 images of 3 classes in 2 Arrow files")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(8).tobytes() == source.read(8).tobytes()


def test_a_file_is_unpacked_once_and_again_when_it_changes(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = open_source(f"parquet:{folder}", "train")
    caplog.set_level("INFO", logger="dad_fast.data")
    one = open_source(f"parquet:{folder}/data/train-00000-of-00002.parquet")
    assert "unpacking" not in caplog.text and "to verify" not in caplog.text and len(one) == 6
    moved = folder.rename(folder.parent / "moved")
    assert open_source(f"parquet:{moved}", "train").fingerprint == before.fingerprint

    file = write_parquet(moved / "data" / "train-00001-of-00002.parquet", 5, first=6)
    os.utime(file, (1, 1))
    caplog.clear()
    after = open_source(f"parquet:{moved}", "train")
    assert "unpacking 1 Parquet files" in caplog.text and "5 images to verify" in caplog.text
    assert len(after) == 11 and after.fingerprint != before.fingerprint
    assert len(list((cache / "parquet").rglob("*train-00001*.arrow"))) == 2
    assert not list(cache.rglob("*.part"))


def test_splits_are_folders_patterns_or_the_beginnings_of_names(folder: Path) -> None:
    data = f"parquet:{folder}"
    assert len(open_source(data)) == 15 and len(open_source(f"{data}@validation")) == 3
    assert len(open_source(data, "data/train-{00000..00001}-of-00002.parquet")) == 12
    assert len(open_source(f"{data}/data/*-of-00001.parquet")) == 3
    settings = DataConfig(data_dir=data)
    assert len(open_split(settings, "val")) == 3 and survey(settings).num_images == 12
    shutil.move(folder / "data", folder / "train")
    assert len(open_source(data, "train")) == 15
    with pytest.raises(UsageError, match=r"has no split 'tset'.*it has no \*.parquet"):
        open_source(data, "tset")
    with pytest.raises(UsageError, match="has no split 'val'; @train takes one alone"):
        open_source(f"{data}@train", "val")


def test_a_share_is_held_out_where_there_is_no_val(folder: Path, cache: Path) -> None:
    (folder / "data" / "validation-00000-of-00001.parquet").unlink()
    data = DataConfig(data_dir=f"parquet:{folder}", val_fraction=0.25)
    facts = survey(data)
    assert (facts.num_images, facts.num_classes) == (9, 3) and facts.num_bytes > 0
    assert not cache.exists()
    train, val = open_split(data, "train"), open_split(data, "val")
    assert np.bincount(train.labels).tolist() == [3, 3, 3] and len(val) == 3
    assert not set(train.keys) & set(val.keys)


def test_columns_and_labels_of_other_kinds(tmp_path: Path, cache: Path) -> None:
    names = [NAMES[i % 3] for i in range(6)]
    file = write_parquet(
        tmp_path / "a.parquet",
        6,
        struct=False,
        columns=("img", "what"),
        features=None,
        labels=names,
    )
    with pytest.raises(DataError, match=r"no column label with class .*img \(binary\), what"):
        open_source(f"parquet:{file}")
    source = open_source(f"parquet:{file},label=what")
    assert source.classes.folders == list(NAMES) and source.labels.tolist() == [0, 1, 2] * 2
    assert source.encoded(1) == pictures(6)[1]
    with pytest.raises(DataError, match="no column pixels with images"):
        open_source(f"parquet:{file},image=pixels,label=what")
    with pytest.raises(DataError, match="the column what is string; images are bytes"):
        open_source(f"parquet:{file},image=what,label=what")
    with pytest.raises(DataError, match="the column img is binary; labels are"):
        open_source(f"parquet:{file},label=img")

    numbers = write_parquet(tmp_path / "b.parquet", 6, features=None)
    assert open_source(f"parquet:{numbers}").classes.folders == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"b\.parquet: its columns or classes are not those of"):
        write_parquet(tmp_path / "both" / "a.parquet", 3, labels=["a", "b", "c"], features=None)
        write_parquet(tmp_path / "both" / "b.parquet", 3, features=None)
        open_source(f"parquet:{tmp_path}/both")


def test_a_class_map_fixes_the_order_by_folder_name_or_number(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = f"parquet:{write_parquet(tmp_path / 'a.parquet', 6)}"

    def classes(*rows: str) -> str:
        (tmp_path / "map.csv").write_text("\n".join(("id,folder,name", *rows)) + "\n")
        return str(tmp_path / "map.csv")

    by_folder = open_source(data, class_map=classes("0,cat,C", "1,bee,B", "2,ant,A"))
    assert by_folder.labels.tolist() == [2, 1, 0] * 2
    by_name = open_source(data, class_map=classes("0,n1,cat", "1,n2,ant", "2,n3,bee"))
    assert by_name.labels.tolist() == [1, 2, 0] * 2 and not caplog.text
    by_number = open_source(data, class_map=classes("0,n1,x", "1,n2,y", "2,n3,z"))
    assert by_number.labels.tolist() == [0, 1, 2] * 2
    assert "none of its classes (ant, bee, cat) is in the class list" in caplog.text
    with pytest.raises(DataError, match="1 of its 3 labels are not in the class list: bee"):
        open_source(data, class_map=classes("0,ant,a", "1,cat,c"))
    wrong = write_parquet(tmp_path / "b.parquet", 3, labels=[0, 1, 7])
    with pytest.raises(DataError, match="has the class 7, and its feature ClassLabel names 0 to 2"):
        open_source(f"parquet:{wrong}")


def test_bad_rows_are_named_and_replaced_alike_by_every_rank(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images: list[bytes | None] = [*pictures(15)]
    images[3], images[4] = b"damaged", None
    labels = [i % 3 for i in range(15)]
    labels[9] = -1
    file = write_parquet(tmp_path / "a.parquet", images=images, labels=labels)
    with pytest.raises(DataError, match=r"3 of 15 images cannot be read: a.parquet:3 .*:4 \(no"):
        open_source(f"parquet:{file}")
    source = open_source(f"parquet:{file}", max_bad_share=0.2)
    assert "a.parquet:9 (the label -1 is no class)" in caplog.text
    assert np.flatnonzero(~source.ok).tolist() == [3, 4, 9]

    whole = check_sequence(source, AUG)
    drawn = {
        number: sample
        for batch in whole
        for number, sample in zip(batch.drawn.tolist(), batch.samples.tolist(), strict=True)
    }
    assert not {3, 4, 9} & set(drawn.values())


def test_a_changed_arrow_file_is_a_bad_image_not_another_one(folder: Path, cache: Path) -> None:
    source = open_source(f"parquet:{folder}", "train")
    for file in cache.rglob("*.arrow"):
        os.utime(file, (1, 1))
    with pytest.raises(DataError, match="parquet:1: the shard has changed since it was indexed"):
        source.read(1)


MISTAKES = [
    ("nowhere", 4, "nowhere: no such file or folder"),
    ("notes.parquet", 4, "notes.parquet: cannot be read as Parquet"),
    ("set@tset", 2, "no split 'tset'"),
    ("set,label=nothing", 4, "no column nothing with class numbers"),
    ("one", 4, "one class, only; a classifier needs two"),
]


@pytest.mark.parametrize(("name", "code", "message"), MISTAKES)
def test_mistakes_are_one_line_before_anything_is_written(
    folder: Path, cache: Path, capsys, name: str, code: int, message: str
) -> None:
    (folder.parent / "notes.parquet").write_text("damaged")
    write_parquet(folder.parent / "one" / "train.parquet", 2, labels=["only"] * 2, features=None)
    write_parquet(folder.parent / "one" / "val.parquet", 2, labels=["only"] * 2, features=None)
    out = folder.parent / "run"
    arguments = ["--data-dir", f"parquet:{folder.parent}/{name}", "--method", "ce", *STUDENT]
    assert main(["train", *arguments, "-o", str(out)]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists() and not (cache / "index").exists()


def test_without_pyarrow_the_fix_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(EnvironmentProblem, match=r"needs the package pyarrow: pip install 'dad-f"):
        open_source(f"parquet:{folder}", "train")


def test_urls_are_read_by_fsspec(folder: Path, cache: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.put(f"{folder}/data/", "/tables/data/", recursive=True)
    try:
        source = open_source("parquet:memory://tables", "train")
        local = open_source(f"parquet:{folder}", "train")
        assert source.fingerprint == local.fingerprint and list(source.keys) == list(local.keys)
        one = "parquet:memory://tables/data/validation-{00000..00000}-of-00001.parquet"
        assert len(open_source(one)) == 3
        listing = find_listing("parquet:memory://tables")
        assert listing is not None and len(listing.images("train", None).entries) == 12
        with pytest.raises(DataError, match="memory://tables/x.parquet: no such file"):
            open_source("parquet:memory://tables/x.parquet")
    finally:
        memory.rm("/tables", recursive=True)
    assert not list(cache.rglob("*.part")) and not list(cache.rglob("*.parquet"))


def test_files_behind_http_are_downloaded_once(server: Server, cache: Path) -> None:
    for name in ("train-000.parquet", "train-001.parquet"):
        write_parquet(server.folder / name, 6)
    server.broken = {0}
    data = f"parquet:{server.url}"
    source = open_source(data, "train-{000..001}.parquet")
    assert len(source) == 12 and source.read(7).size == (21, 24)
    assert [bool(asked) for _, asked, _ in server.requests] == [False, True, False]
    assert len(open_source(f"{data}/train-{{000..001}}.parquet")) == 12
    assert len(server.requests) == 3
    with pytest.raises(UsageError, match="name the files of 'train' by a pattern"):
        open_source(data, "train")
    with pytest.raises(DataError, match="train-002.parquet: the server answers 404"):
        open_source(data, "train-{001..002}.parquet")


def test_an_unreachable_server_and_a_missing_file_system_have_exit_code_3(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dad_fast.data.sources.http._PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(EnvironmentProblem, match="127.0.0.1:9/a.parquet: cannot be downloaded"):
        open_source("parquet:http://127.0.0.1:9/a.parquet")
    with pytest.raises(UsageError, match="Protocol not known: nosuch"):
        open_source("parquet:nosuch://bucket/a.parquet")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(EnvironmentProblem, match="gcsfs"):
        open_source("parquet:gs://bucket/a.parquet")


def test_doctor_describes_a_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dad_fast.tools.doctor.data.SECONDS", 0.05)
    assert main(["doctor", "--data", f"parquet:{folder}", "--loader", "pil"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "@train: 12 images of 3 classes in 2 Arrow files" in text and "JPEG 12" in text
    write_parquet(folder / "bad.parquet", 3, images=[picture(9), b"", b"x"])
    bad = ["doctor", "--data", f"parquet:{folder}/bad.parquet", "--loader", "pil"]
    assert main(bad) == 4
    assert "bad.parquet:1 (no image in this row)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_loader_processes_read_without_pyarrow(folder: Path) -> None:
    source = open_source(f"parquet:{folder}", "train")
    (folder / "source.pickle").write_bytes(pickle.dumps(source))
    code = (
        "import pickle, sys; source = pickle.load(open(sys.argv[1], 'rb')); "
        "assert source.read(7).size == (21, 24); "
        "assert not {'pyarrow', 'datasets', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "source.pickle")], check=True)
    here = list(TrainLoader(source, AUG, 16, 4, 3, 0).batches(0, 3))
    there = list(TrainLoader(source, AUG, 16, 4, 3, 2).batches(0, 3))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
