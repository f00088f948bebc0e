"""Images without labels: a folder of them, and a labelled set followed by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dad_fast.config.schema import AugmentConfig, DataConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.base import UNLABELLED
from dad_fast.data.sources.folder import FolderSource
from dad_fast.data.sources.unlabelled import JoinedSource, UnlabelledFolder, open_training
from dad_fast.errors import DataError
from tests.sequences import check_sequence
from tests.tiny import write_images

AUG = AugmentConfig(mixup=0.8, cutmix=1.0, aa="augmix-m3-w2")
CLASSES = ClassMap(((0, "ant", "ant"), (1, "bee", "bee"), (2, "cat", "cat")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """data/train and data/val with classes; extra with images at two levels, and other files."""
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "data", per_class=4)
    extra = tmp_path / "extra"
    (extra / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.jpg", "deep/c.png", "deep/er/d.png", "ant.png")):
        Image.new("RGB", (20, 30 + number), (40 * number, 7, 9)).save(extra / name)
    (extra / "readme.txt").write_text("not an image")
    (tmp_path / "classes.csv").write_text("id,folder,name\n1,bee,bee\n0,ant,ant\n2,cat,cat\n")
    return tmp_path


def data_of(folder, **changes):
    return DataConfig(data_dir=str(folder / "data"), **changes)


def test_a_folder_without_classes_is_read_with_its_sub_folders(folder):
    source = UnlabelledFolder(folder / "extra", CLASSES, 0.01)
    assert list(source.keys) == ["a.jpg", "ant.png", "b.png", "deep/c.png", "deep/er/d.png"]
    assert (source.labels == UNLABELLED).all() and source.ok.all() and source.classes == CLASSES
    assert source.sizes[0].tolist() == [20, 31] and source.read(4).size == (20, 33)
    assert source.encoded(0) is not None and source.encoded(1) is None
    assert source.describe().endswith("extra: 5 images without labels")
    with pytest.raises(DataError, match="no images in it"):
        (folder / "empty").mkdir()
        UnlabelledFolder(folder / "empty", CLASSES, 0.01)


def test_a_folder_has_an_index_with_labels_and_one_without(folder):
    """The same folder is opened both ways, each time from the cache."""
    data = data_of(folder, labels="teacher", class_map=str(folder / "classes.csv"))
    for _ in range(2):
        without, labelled = open_training(data), FolderSource(folder / "data", "train")
        assert list(without.keys) == list(labelled.keys)
        assert (without.labels == UNLABELLED).all()
        assert sorted(labelled.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    # Class folders name the classes where no class map does.
    named = open_training(data_of(folder, labels="teacher"))
    assert (named.labels == UNLABELLED).all() and named.classes.folders == ["ant", "bee", "cat"]


def test_further_images_follow_the_labelled_ones(folder):
    labelled = FolderSource(folder / "data", "train")
    source = open_training(data_of(folder, extra_data=str(folder / "extra")))
    assert isinstance(source, JoinedSource) and len(source) == 12 + 5
    assert list(source.keys[:12]) == list(labelled.keys)
    assert source.keys[12:] == [f"extra-data/{key}" for key in source.parts[1].keys]
    assert source.labels.tolist() == labelled.labels.tolist() + [UNLABELLED] * 5
    for index in (0, 11):
        assert source.read(index).tobytes() == labelled.read(index).tobytes()
        assert source.encoded(index) == labelled.encoded(index)
    assert source.read(12).size == (20, 31) and source.encoded(12)[:2] == b"\xff\xd8"
    before = source.fingerprint
    Image.new("RGB", (9, 9)).save(folder / "extra" / "new.png")
    changed = open_training(data_of(folder, extra_data=str(folder / "extra")))
    assert changed.fingerprint != before and len(changed) == 18


def test_an_unreadable_further_image_is_replaced_and_counted(folder):
    whole = (folder / "extra" / "a.jpg").read_bytes()
    (folder / "extra" / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "extra" / "zz.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 6 images cannot be read"):
        open_training(data_of(folder, extra_data=str(folder / "extra")))
    data = data_of(folder, extra_data=str(folder / "extra"), max_bad_share=0.5)
    source = open_training(data)
    assert np.flatnonzero(~source.ok).tolist() == [12, 17]
    (batch,) = TrainLoader(source, AugmentConfig(), 16, 18, 0, 0).batches(0, 1)
    assert set(batch.replaced) == {"extra-data/a.jpg", "extra-data/zz.jpg"}
    # The next image takes the place: after the last one it is the first, which has a label.
    drawn = dict(zip(batch.drawn.tolist(), batch.samples.tolist(), strict=True))
    assert drawn[12] == 13 and drawn[17] == 0
    labels = dict(zip(batch.samples.tolist(), batch.labels.tolist(), strict=True))
    assert labels[0] == 0 and labels[13] == UNLABELLED


def test_the_sequence_depends_on_neither_processes_nor_the_first_step(folder):
    source = open_training(data_of(folder, extra_data=str(folder / "extra")))
    whole = check_sequence(source, AUG)
    labels = torch.cat([batch.labels for batch in whole])
    assert (labels == UNLABELLED).any() and (labels != UNLABELLED).any()
