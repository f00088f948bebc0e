"""Hugging Face data sets: saved ones, folders, the hub without a network, and commands that use them."""

from __future__ import annotations

import pickle
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dad_fast.cli.main import main
from dad_fast.config.schema import AugmentConfig, DataConfig, EvalConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.registry import open_source
from dad_fast.data.sources.splits import open_split
from dad_fast.data.sources.survey import survey
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.evaluation.suites.open import check_suites, open_suites, open_unknown
from dad_fast.tools.predict import find_images
from tests.tables import NAMES, data_set, pictures, save_splits, write_splits
from tests.tiny import STUDENT, write_teacher

datasets = pytest.importorskip("datasets")

AUG = AugmentConfig(mixup=0.8, cutmix=1.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_splits(tmp_path_factory.mktemp("saved") / "digits@home")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_saved_set_is_read_where_it_lies(saved: Path, cache: Path, no_network: None) -> None:
    source = open_source(f"hfds:{saved}", "train")
    assert list(source.keys) == [str(i) for i in range(12)] and source.ok.all()
    assert source.labels.tolist() == [i % 3 for i in range(12)]
    assert source.classes.folders == list(NAMES)
    assert source.encoded(3) == pictures(12)[3] and source.sizes[3].tolist() == [23, 24]
    assert source.describe() == f"hfds:{saved}@train: 12 images of 3 classes in 1 Arrow files"
    assert pickle.loads(pickle.dumps(source)).read(8).size == (28, 24)
    assert not list(cache.rglob("*.arrow"))

    one = open_source(f"hfds:{saved}@validation")
    assert len(one) == 3 and one.fingerprint != source.fingerprint
    assert len(open_source(f"hfds:{saved / 'train'}")) == 12


def test_a_folder_with_parquet_files_is_read_without_a_network(
    tmp_path: Path, cache: Path, saved: Path, no_network: None
) -> None:
    source = open_source(f"hfds:{write_splits(tmp_path / 'set')}", "train")
    assert source.fingerprint == open_source(f"hfds:{saved}", "train").fingerprint
    assert source.classes.folders == list(NAMES)


def test_splits_and_counts(saved: Path, cache: Path) -> None:
    data = DataConfig(data_dir=f"hfds:{saved}")
    assert len(open_split(data, "val")) == 3
    facts = survey(data)
    assert facts.num_images == 12 and facts.num_bytes == sum(map(len, pictures(12)))
    alone = DataConfig(data_dir=f"hfds:{saved}@train", val_fraction=0.25)
    assert survey(alone).num_images == 9
    train, val = open_split(alone, "train"), open_split(alone, "val")
    assert len(train) == 9 and len(val) == 3 and not set(train.keys) & set(val.keys)
    with pytest.raises(UsageError, match="no split 'tset'; it has train, validation"):
        open_source(f"hfds:{saved}", "tset")
    with pytest.raises(UsageError, match="hfds: names no data set"):
        open_source("hfds:", "train")
    with pytest.raises(UsageError, match="no split 'val'; it has train, validation .@train takes"):
        open_source(f"hfds:{saved}@train", "val")


def test_batches_follow_from_seed_epoch_and_sample(saved: Path, cache: Path) -> None:
    source = open_source(f"hfds:{saved}", "train")
    whole = list(TrainLoader(source, AUG, 16, 4, 3, 0).batches(0, 6))
    later = list(TrainLoader(source, AUG, 16, 4, 3, 0).batches(3, 6))
    halves = [
        list(TrainLoader(source, AUG, 16, 2, 3, 0, rank=rank, world=2).batches(0, 6))
        for rank in range(2)
    ]
    for step, batch in enumerate(whole):
        both = torch.cat([half[step].images for half in halves])
        assert torch.equal(batch.images, both)
        assert step < 3 or torch.equal(batch.images, later[step - 3].images)


def test_bad_images_and_labels_are_named(tmp_path: Path, cache: Path, caplog) -> None:
    images: list[bytes | None] = [*pictures(6)]
    images[2], images[3] = b"damaged", None
    bad = data_set(6, images=images, labels=[0, 1, 2, 0, -1, 2])
    bad.save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(
        DataError, match=r"3 of 6 images cannot be read: 2 \(not an image\), 3 \(no"
    ):
        open_source(f"hfds:{tmp_path}/bad")
    source = open_source(f"hfds:{tmp_path}/bad", max_bad_share=0.5)
    assert np.flatnonzero(~source.ok).tolist() == [2, 3, 4]
    assert "4 (the label -1 is no class)" in caplog.text


def test_columns_by_other_names(tmp_path: Path, cache: Path) -> None:
    coarse = datasets.ClassLabel(names=["insect", "pet"])
    table = data_set(6).rename_columns({"image": "img", "label": "fine_label"})
    table = table.add_column("coarse_label", [0, 0, 1] * 2).cast_column("coarse_label", coarse)
    table.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"no column label .*fine_label \(int64\), coarse_label"):
        open_source(f"hfds:{tmp_path}/set")
    fine = open_source(f"hfds:{tmp_path}/set,label=fine_label")
    assert fine.classes.folders == list(NAMES)
    other = open_source(f"hfds:{tmp_path}/set,label=coarse_label,image=img")
    assert other.classes.folders == ["insect", "pet"] and other.labels.tolist() == [0, 0, 1] * 2


def test_a_set_is_a_suite_of_another_run_and_unknown_images(saved: Path, cache: Path) -> None:
    data = DataConfig(data_dir="embedded:digits")
    name = f"hfds:{saved}@validation"
    check_suites([name], data)
    model = ClassMap(((0, "cat", "cat"), (1, "bee", "bee"), (2, "ant", "ant"), (3, "dog", "dog")))
    (suite,) = open_suites([name], data, model)
    assert suite.name == "digits@home@validation" and suite.source.classes == model
    assert suite.source.labels.tolist() == [2, 1, 0]
    digits = ClassMap(((0, "zero", "zero"), (1, "one", "one"), (2, "two", "two")))
    label, unknown, corruption = open_unknown(name, data, digits, EvalConfig(), None)
    assert label == "digits@home@validation" and corruption is None
    assert unknown.pieces[0].labels.tolist() == [-1] * 3
    with pytest.raises(UsageError, match=f"--suite hfds:{saved}@tset: .*no split 'tset'"):
        check_suites([f"hfds:{saved}@tset"], data)
    few = ClassMap(((0, "ant", "ant"), (1, "dog", "dog")))
    with pytest.raises(DataError, match=f"--suite {name}: .*2 of its 3 labels are not in the"):
        open_suites([name], data, few)


def test_the_hub_without_a_network_has_exit_code_3(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_network: None
) -> None:
    arguments = ["--data-dir", "hfds:hf-hub:nobody/nothing", "--method", "ce", *STUDENT]
    assert main(["train", *arguments, "-o", str(tmp_path / "run")]) == 3
    error = capsys.readouterr().err
    assert "Couldn't reach 'nobody/nothing'" in error and "save_to_disk(FOLDER)" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


MISTAKES = [
    ("nobody/nothing", 4, "no such folder; a set on the hub is hfds:hf-hub:OWNER/NAME"),
    ("EMPTY", 4, "datasets cannot read it"),
    ("SAVED@tset", 2, "no split 'tset'"),
    ("SAVED,label=what", 4, "no column what with class numbers or names"),
    ("SAVED,image=label", 4, "the column label is int64; images are bytes"),
]


@pytest.mark.parametrize(("name", "code", "message"), MISTAKES)
def test_mistakes_are_one_line(
    saved: Path, cache: Path, tmp_path: Path, capsys, name: str, code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    name = name.replace("SAVED", str(saved)).replace("EMPTY", str(tmp_path / "empty"))
    arguments = ["--data-dir", f"hfds:{name}", "--method", "ce", *STUDENT]
    assert main(["train", *arguments, "-o", str(tmp_path / "run")]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists() and not (cache / "index").exists()


def test_without_the_package_the_fix_is_named(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    other = tmp_path / "copy"
    other.symlink_to(saved)
    with pytest.raises(EnvironmentProblem, match=r"needs the package datasets: pip install 'dad-f"):
        open_source(f"hfds:{other}", "train")


def test_images_without_labels_can_be_predicted(tmp_path: Path, cache: Path) -> None:
    data_set(3, labels=[-1] * 3).remove_columns("label").save_to_disk(str(tmp_path / "set"))
    found = list(find_images([f"hfds:{tmp_path}/set", "photo.jpg"]))
    assert [name for name, _ in found] == [
        *(f"hfds:{tmp_path}/set:{i}" for i in range(3)),
        "photo.jpg",
    ]
    assert found[1][1].read() == pictures(3)[1] and not cache.exists()


def test_doctor_describes_a_set(
    saved: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dad_fast.tools.doctor.data.SECONDS", 0.05)
    assert main(["doctor", "--data", f"hfds:{saved}@validation", "--loader", "pil"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "@validation: 3 images of 3 classes" in text and "0 ant, 1 bee, 2 cat" in text


@pytest.mark.slow
def test_a_store_of_a_set_is_filled_and_trained_from(
    saved: Path, cache: Path, tmp_path: Path
) -> None:
    write_teacher(tmp_path / "teacher.safetensors")
    common = ["--data-dir", f"hfds:{saved}", "--teacher", str(tmp_path / "teacher.safetensors")]
    common += ["--discretizer", "jpeg:60", "--img-size", "32", "--device", "cpu", "--workers", "1"]
    store = str(tmp_path / "store")
    assert main(["precompute", *common, "--images", "raw", "-o", store]) == 0
    assert main(["store", "verify", store]) == 0
    train = ["--method", "dad", *STUDENT, "--store", store, "--batch-size", "4", "--max-steps", "2"]
    assert main(["train", *common, *train, "-o", str(tmp_path / "run")]) == 0
