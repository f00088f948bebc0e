"""Images listed in a CSV or TSV: splits, classes, bad files, mistakes and a run that resumes."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from dad_fast.cli.main import main
from dad_fast.config.schema import AugmentConfig, DataConfig
from dad_fast.data.sources.registry import open_source
from dad_fast.data.sources.splits import open_split
from dad_fast.data.sources.survey import survey
from dad_fast.errors import DataError, UsageError
from tests.sequences import check_sequence
from tests.shards import picture
from tests.tiny import STUDENT

AUG = AugmentConfig(mixup=0.8, cutmix=1.0)
NAMES = ("ant", "bee", "cat")


def rows_of(split: str = "") -> list[str]:
    return [f"images/{i:02d}.jpg,{NAMES[i % 3]}{split}" for i in range(15)]


def write(file: Path, header: str, rows: list[str]) -> str:
    file.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return f"csv:{file}"


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(15):
        content = picture(15 * i, size=(20 + i, 24))
        (tmp_path / "images" / f"{i:02d}.jpg").write_bytes(content)
    return tmp_path


@pytest.fixture
def split_list(folder: Path) -> str:
    rows = [
        f"{row},{'train' if i < 9 else 'val' if i < 12 else 'test'}"
        for i, row in enumerate(rows_of())
    ]
    return write(folder / "split.csv", "path,label,split", rows)


def test_rows_become_images_in_the_order_of_their_paths(folder: Path) -> None:
    rows = rows_of()
    listed = write(folder / "list.csv", "path,label", rows)
    source = open_source(listed, "train")
    assert list(source.keys) == [f"images/{i:02d}.jpg" for i in range(15)]
    assert source.labels.tolist() == [i % 3 for i in range(15)]
    assert source.classes.folders == list(NAMES) and source.ok.all()
    assert source.sizes[4].tolist() == [24, 24] and source.read(4).size == (24, 24)
    assert source.encoded(4) == (folder / "images" / "04.jpg").read_bytes()
    assert source.describe() == f"{folder}/list.csv: 15 images of 3 classes"
    assert pickle.loads(pickle.dumps(source)).read(3).size == (23, 24)

    random.Random(0).shuffle(rows)
    tabs = [f"note\t{row.split(',')[1]}\t{row.split(',')[0]}" for row in rows]
    shuffled = open_source(write(folder / "list.tsv", "﻿note\tlabel\tpath", tabs))
    assert list(shuffled.keys) == list(source.keys)
    assert shuffled.fingerprint == source.fingerprint


def test_a_new_label_counts_without_verifying_again(folder: Path, caplog) -> None:
    listed = write(folder / "list.csv", "path,label", rows_of())
    before = open_source(listed)
    write(folder / "list.csv", "path,label", ["images/00.jpg,cat", *rows_of()[1:]])
    os.utime(folder / "list.csv", (1, 1))
    with caplog.at_level("INFO", logger="dad_fast.data"):
        after = open_source(listed)
    assert "to verify" not in caplog.text
    assert after.labels[0] == 2 and after.fingerprint != before.fingerprint


def test_splits_are_values_of_the_column(split_list: str) -> None:
    data = DataConfig(data_dir=split_list, val_fraction=0.5)
    train, val = open_split(data, "train"), open_split(data, "val")
    assert (len(train), len(val), len(open_split(data, "test"))) == (9, 3, 3)
    assert train.classes == val.classes
    assert survey(data).num_images == 9 and survey(data).num_bytes > 0
    with pytest.raises(UsageError, match="no split 'valid'; it has test, train, val"):
        open_split(data, "valid")


def test_without_the_column_a_share_is_held_out(folder: Path, cache: Path) -> None:
    listed = write(folder / "list.csv", "path,label", rows_of())
    data = DataConfig(data_dir=listed, val_fraction=0.2)
    assert survey(data)[1:] == (12, pytest.approx(12 * 900, rel=0.5), 3)
    assert not cache.exists()
    train, val = open_split(data, "train"), open_split(data, "val")
    assert np.bincount(train.labels).tolist() == [4, 4, 4] and len(val) == 3
    assert not set(train.keys) & set(val.keys)
    with pytest.raises(UsageError, match="no column split.*--val-fraction 0.1"):
        open_split(DataConfig(data_dir=listed), "val")


def test_classes_are_numbers_by_value_or_those_of_the_class_map(folder: Path) -> None:
    rows = [f"images/{i:02d}.jpg,{(2, 10, 1)[i % 3]}" for i in range(15)]
    listed = write(folder / "list.csv", "path,label", rows)
    assert open_source(listed).classes.folders == ["1", "2", "10"]
    classes = folder / "classes.csv"
    classes.write_text("id,folder,name\n0,1,one\n1,10,ten\n2,2,two\n")
    assert open_source(listed, class_map=str(classes)).labels[:3].tolist() == [2, 1, 0]
    ids = "".join(f"{i},n{i},n{i}\n" for i in range(11))
    classes.write_text(f"id,folder,name\n{ids}")
    assert open_source(listed, class_map=str(classes)).labels[:3].tolist() == [2, 10, 1]
    classes.write_text("id,folder,name\n0,1,one\n1,2,two\n")
    with pytest.raises(DataError, match="1 of its 3 labels are not in the class list: 10"):
        open_source(listed, class_map=str(classes))


def test_bad_files_are_named_and_replaced(folder: Path, caplog) -> None:
    listed = write(folder / "list.csv", "path,label", rows_of())
    (folder / "images" / "03.jpg").write_bytes(b"damaged")
    (folder / "images" / "04.jpg").unlink()
    with pytest.raises(DataError, match=r"2 of 15 images cannot be read: images/03.jpg .*04.jpg"):
        open_source(listed)
    source = open_source(listed, max_bad_share=0.2)
    assert "images/04.jpg (no such file)" in caplog.text
    assert np.flatnonzero(~source.ok).tolist() == [3, 4]

    whole = check_sequence(source, AUG)
    drawn = {
        number: sample
        for batch in whole
        for number, sample in zip(batch.drawn.tolist(), batch.samples.tolist(), strict=True)
    }
    taken = {drawn[bad] for bad in (3, 4) if bad in drawn}
    assert taken == {5} and not {3, 4} & set(drawn.values())
    assert set().union(*(batch.replaced for batch in whole)) <= {"images/03.jpg", "images/04.jpg"}


MISTAKES = [
    ("path,name", ["a.jpg,ant"], 4, "no column label"),
    ("path,label", [], 4, "no images in it"),
    ("path,label", ["a.jpg,"], 4, "line 2: no label"),
    ("path,label", ["a.jpg,ant", "a.jpg,bee"], 4, "a.jpg is listed twice"),
    ("path,label", ["a.jpg,ant", "b.jpg,ant"], 4, "one class"),
    ("path,label,split", ["a.jpg,ant,train", "b.jpg,bee,train"], 2, "no split 'val'"),
]


@pytest.mark.parametrize(("header", "rows", "code", "message"), MISTAKES)
def test_mistakes_are_one_line_before_anything_is_written(
    folder: Path, cache: Path, capsys, header: str, rows: list[str], code: int, message: str
) -> None:
    listed = write(folder / "list.csv", header, rows)
    out = folder / "run"
    fraction = [] if "split" in header else ["--val-fraction", "0.3"]
    arguments = ["train", "--data-dir", listed, "--method", "ce", *STUDENT]
    arguments += [*fraction, "-o", str(out)]
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert message in error and "list.csv" in error and error.count("\n") == 1
    assert not out.exists() and not cache.exists()


def test_a_missing_list_is_one_line(folder: Path, capsys) -> None:
    listed = f"csv:{folder}/none.csv"
    arguments = ["--data-dir", listed, "--method", "ce", *STUDENT, "-o", str(folder / "run")]
    assert main(["train", *arguments]) == 4
    assert "none.csv: No such file" in capsys.readouterr().err
    assert main(["doctor", "--data", listed]) == 4


def test_doctor_describes_a_list(split_list: str, capsys) -> None:
    assert main(["doctor", "--data", split_list, "--loader", "pil"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "split.csv, split train: 9 images of 3 classes" in text and "JPEG 9" in text


def test_a_list_trains(split_list: str, cache: Path, capsys, tmp_path: Path) -> None:
    arguments = [
        *("train", "--data-dir", split_list, "--method", "ce", *STUDENT, "--batch-size", "4"),
        *("--workers", "0", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"),
        *("--suite", "test", "-o", str(tmp_path / "run")),
    ]
    assert main([*arguments, "--dry-run"]) == 0
    assert "9 images of 3 classes" in capsys.readouterr().out
    assert not cache.exists() and not (tmp_path / "run").exists()
    assert main([*arguments, "--max-steps", "2"]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > 1

    (tmp_path / "other").mkdir()
    assert main([*arguments, "--suite", "tset", "-o", str(tmp_path / "other")]) == 2
    assert "--suite tset" in capsys.readouterr().err and not any((tmp_path / "other").iterdir())
