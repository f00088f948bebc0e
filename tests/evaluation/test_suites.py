"""Published test sets in their true layouts: order of labels, masks, borders, missing parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")

from imagenet_folders import OBJECTNET, Reader, write_classes, write_objectnet
from suites import PARTIAL, WNIDS, OfMap, evaluated, numbers_of, shuffled_map

from dad_fast.config.schema import DataConfig, EvalConfig
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluation.runner import open_suites
from dad_fast.evaluation.suites.imagenet import imagenet_classes, join, published, subset_wnids
from dad_fast.evaluation.suites.registry import PUBLISHED, SUITES


@pytest.mark.parametrize("kind", ["imagenet", "imagenet-sketch", "imagenet-stylized"])
def test_wnid_folders(tmp_path: Path, kind: str) -> None:
    inside = {"imagenet": "val", "imagenet-sketch": "sketch", "imagenet-stylized": ""}[kind]
    chosen = WNIDS[::97]
    write_classes(tmp_path / inside, numbers_of(chosen), each=2)
    found = evaluated(f"{kind}={tmp_path}")
    assert (found.name, found.num_images, found.top1, found.top5) == (kind, 22, 100.0, 100.0)
    assert (
        "partial: 11 of 1,000 class folders, 22 of 5" in found.protocol
        and "logits of" not in found.protocol
    )
    wrong = evaluated(f"{kind}={tmp_path}", Reader(offset=1, margin=1.0))
    assert (wrong.top1, wrong.top5) == (
        0.0,
        100.0,
    )  # another class is preferred, and nothing masks it


def test_v2_folders_are_numbers_not_names(tmp_path: Path) -> None:
    """In string order (0, 1, 10, 100 …) 988 of the 1000 folders would be another class."""
    folders = {str(i): i for i in range(1000)}
    assert sum(sorted(folders)[i] == str(i) for i in range(1000)) == 12
    write_classes(tmp_path / "imagenetv2-matched-frequency-format-val", folders)
    found = evaluated(f"imagenet-v2={tmp_path}", batch_size=500)
    assert found.num_images == 1000 and found.top1 == 100.0
    assert (
        found.protocol
        == "resize 8 bilinear, crop 8; partial: 1,000 of 1,000 class folders, 1,000 of 10,000 images"
    )
    shutil.rmtree(tmp_path)
    write_classes(tmp_path, numbers_of(WNIDS[100:105]))  # as some copies are
    assert evaluated(f"imagenet-v2={tmp_path}").top1 == 100.0


@pytest.mark.parametrize("letter", ["a", "r"])
def test_only_the_200_classes_of_a_and_r_compete(tmp_path: Path, letter: str) -> None:
    own = subset_wnids(letter)
    write_classes(tmp_path, numbers_of(own))
    others = {i for i in range(1000) if WNIDS[i] not in own}
    # Preferring a class that is not of the 200 costs nothing, preferring one of the 200 does.
    offset = 1
    shifted = np.mean([((WNIDS.index(w) + offset) % 1000) in others for w in own])
    assert 0.3 < shifted < 0.95
    found = evaluated(f"imagenet-{letter}={tmp_path}", Reader(offset=offset, margin=1.0))
    assert found.num_images == 200 and found.top1 == pytest.approx(100 * shifted)
    assert "logits of the 200 classes" in found.protocol
    assert evaluated(f"imagenet-{letter}={tmp_path}").top1 == 100.0
    # Softmax over 200 outputs, of which one is 5 and the others 0.
    confidence = np.exp(5) / (np.exp(5) + 199)
    assert evaluated(f"imagenet-{letter}={tmp_path}").nll == pytest.approx(-np.log(confidence))


def test_classes_of_a_and_r_are_of_imagenet_and_differ() -> None:
    a, r = subset_wnids("a"), subset_wnids("r")
    assert len(set(a)) == len(set(r)) == 200 and set(a) | set(r) <= set(WNIDS)
    assert (
        "n01498041" in a and "n01443537" in r and "n01443537" not in a
    )  # stingray; goldfish is in R only


def test_folder_of_another_set_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, numbers_of(WNIDS[:40]))
    with pytest.raises(DataError, match="class folders are not of it, such as n01440764"):
        evaluated(f"imagenet-a={tmp_path}")


def test_objectnet(tmp_path: Path) -> None:
    root = write_objectnet(tmp_path / "objectnet-1.0")
    for path in (root, root / "images", tmp_path):
        found = evaluated(f"objectnet={path}")
        assert (found.num_images, found.top1) == (10, 100.0), (
            path
        )  # the two classes that ImageNet has not are left out
    assert (
        "any of a folder's ids is right" in found.protocol
        and "partial: 5 of 5 class folders, 10 of 18,574 images" in found.protocol
    )
    # Any of a folder's ids is right, and nothing is masked: 5 more than 409 is none of a clock's ids, 121 more is the digital clock.
    assert evaluated(f"objectnet={root}", Reader(offset=5, margin=1.0)).top1 == 0.0
    clock = evaluated(f"objectnet={root}", Reader(offset=121, margin=1.0)).records
    assert clock["correct"].reshape(5, 2)[0].tolist() == [1, 1] and clock["correct"].sum() == 2


def test_objectnets_border_is_cut_off(tmp_path: Path) -> None:
    """With the red line of two pixels the model would read another number."""
    root = write_objectnet(tmp_path)
    sizes = {path.stat().st_size for path in (root / "images").rglob("*.png")}
    assert sizes and evaluated(f"objectnet={root}").top1 == 100.0
    write_classes(root / "images", {"banana": 954}, 2, ".png", border=3)  # a third pixel remains
    assert evaluated(f"objectnet={root}", view=View(10, 1.0, "bilinear")).top1 < 100.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: shutil.rmtree(m), "copy the folder mappings from ObjectNet"),
        (
            lambda m: (m / "objectnet_to_imagenet_1k.json").unlink(),
            "objectnet_to_imagenet_1k.json: no such file",
        ),
        (
            lambda m: (m / "objectnet_to_imagenet_1k.json").write_text('{"Banana": "ananas"}'),
            "'ananas' of 'Banana' is no class of Imag",
        ),
        (lambda m: (m / "objectnet_to_imagenet_1k.json").write_text("{"), "not readable as JSON"),
        (
            lambda m: (m / "folder_to_objectnet_label.json").write_text('["a"]'),
            "not a table of texts",
        ),
        (
            lambda m: (m / "folder_to_objectnet_label.json").write_text('{"a": "B"}'),
            "no label in common",
        ),
    ],
)
def test_objectnets_mappings_are_checked(tmp_path: Path, damage, message: str) -> None:
    root = write_objectnet(tmp_path)
    damage(root / "mappings")
    with pytest.raises(DataError, match=message) as caught:
        evaluated(f"objectnet={root}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "imagenet",
            r"imagenet: 3 of 1,000 class folders, 6 of 50,000 images in .* \(without n0\d+, .* more\); finish the download",
        ),
        ("imagenet-r", r"imagenet-r: 3 of 200 class folders, 6 of 30,000 images"),
        ("imagenet-a", r"imagenet-a: 3 of 200 class folders, 6 of 7,500 images"),
    ],
)
def test_half_downloaded_folders_are_named(tmp_path: Path, kind: str, message: str) -> None:
    chosen = [wnid for wnid in subset_wnids("a") if wnid in subset_wnids("r")][:3]
    write_classes(tmp_path, numbers_of(chosen), each=2)
    (
        tmp_path
        / sorted(set(subset_wnids(kind[-1]) if kind != "imagenet" else WNIDS) - set(chosen))[0]
    ).mkdir()  # an empty one does not count
    with pytest.raises(DataError, match=message) as caught:
        evaluated(f"{kind}={tmp_path}", options=EvalConfig())
    assert "--allow-partial" in str(caught.value) and "\n" not in str(caught.value)
    assert evaluated(f"{kind}={tmp_path}").num_images == 6


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "imagenet-a={}/none",
            DataError,
            "no such folder; expected 200 class folders such as n01498041 with 7,500 images",
        ),
        (
            "imagenet-v2={}",
            DataError,
            "contains none of its class folders .it has cats, dogs.; expected 1,000 class folders 0 … 999",
        ),
        (
            "imagenet-c={}",
            DataError,
            "no CORRUPTION/SEVERITY folders; expected CORRUPTION/SEVERITY/WNID folders of 15",
        ),
        ("objectnet={}", DataError, "contains none of its class folders"),
        (
            "imagenet-s={}",
            UsageError,
            "'imagenet-s' is no kind of test set; did you mean imagenet-s",
        ),
        ("imagenet-a=", UsageError, "name its folder, as in imagenet-a=/data/imagenet-a"),
    ],
)
def test_wrong_names_and_folders_are_refused(
    tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    write_classes(tmp_path, {"cats": 0, "dogs": 1})
    with pytest.raises(error, match=message) as caught:
        evaluated(name.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_bare_name_is_a_folder_of_the_data(tmp_path: Path) -> None:
    write_classes(tmp_path / "imagenet-r", numbers_of(subset_wnids("r")[:4]))
    write_classes(tmp_path / "val", numbers_of(subset_wnids("r")[:2]))
    two = ClassMap(tuple((i, wnid, wnid) for i, wnid in enumerate(subset_wnids("r")[:2])))
    suites = open_suites(
        ["val", "imagenet-r", "contrast:2"], DataConfig(data_dir=str(tmp_path)), two, PARTIAL
    )
    assert [suite.name for suite in suites] == ["val", "imagenet-r", "contrast:2"] and suites[
        2
    ].source is suites[0].source
    assert (
        "only 2 of 4 classes are the model's" in suites[1].source.note
        and len(suites[1].source) == 2
    )


@pytest.mark.parametrize("names", [False, True])
def test_model_with_some_classes_in_another_order(tmp_path: Path, names: bool) -> None:
    a = list(subset_wnids("a"))
    write_classes(tmp_path, numbers_of(a), each=1)
    own = a[:30] + [wnid for wnid in WNIDS if wnid not in a][:20]
    listed = shuffled_map(own, names=names)
    wnid_of = {
        name: wnid
        for wnid, name in zip(imagenet_classes().folders, imagenet_classes().names, strict=True)
    }
    numbers = [WNIDS.index(wnid_of[name]) for name in listed.names]
    found = evaluated(f"imagenet-a={tmp_path}", OfMap(numbers), listed)
    assert (found.num_images, found.top1) == (30, 100.0)
    assert "logits of the 30 classes; only 30 of 200 classes are the model's" in found.protocol
    assert (found.records["prediction"] < 50).all() and len(
        set(found.records["label"].tolist())
    ) == 30


def test_model_without_any_of_the_classes_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, numbers_of(WNIDS[:2]))
    cats = ClassMap(((0, "siamese", "siamese"), (1, "mog", "mog")))
    with pytest.raises(
        DataError, match=r"none of the model's 2 classes \(siamese, mog\) is one of its 2"
    ) as caught:
        evaluated(f"imagenet={tmp_path}", Reader(2), cats)
    assert "\n" not in str(caught.value)


def test_join_by_unique_names_only() -> None:
    model = ClassMap(((0, "crane", "crane"), (1, "Egyptian_cat", "x"), (2, "0002", "tench")))
    wanted = [
        ("n02012849", "crane"),
        ("n03126707", "crane"),
        ("n02124075", "egyptian cat"),
        ("n01440764", "Tench"),
    ]
    assert join(model, wanted) == [None, None, 1, 2]
    assert join(ClassMap(((0, "n01440764", "a"), (1, "crane", "b"))), wanted) == [
        None,
        None,
        None,
        0,
    ]  # wnids: no guessing by name


def test_subset_of_a_plain_folder(tmp_path: Path) -> None:
    listed = ClassMap(tuple((i, f"c{i}", f"class {i}") for i in range(6)))
    write_classes(tmp_path / "part", {"c4": 4, "c1": 1})
    with pytest.raises(DataError, match="lacks 4 of the 6 listed classes"):
        evaluated(str(tmp_path / "part"), Reader(6), listed)
    found = evaluated(f"subset={tmp_path / 'part'}", Reader(6, offset=1, margin=1.0), listed)
    assert (found.name, found.top1, found.protocol) == (
        "part",
        100.0,
        "resize 8 bilinear, crop 8; logits of the 2 classes",
    )
    assert (
        evaluated(f"subset={tmp_path / 'part'}", Reader(6, offset=3, margin=1.0), listed).top1
        == 0.0
    )  # 1 + 3 and 4 + 3 - 6 compete
    write_classes(tmp_path / "part", {"yak": 5})
    with pytest.raises(
        DataError,
        match="1 of its 3 classes are not the model's .yak.; remove them, or name their classes",
    ):
        evaluated(f"subset={tmp_path / 'part'}", Reader(6), listed)


def test_folder_with_a_class_map(tmp_path: Path) -> None:
    listed = ClassMap(((0, "c0", "cat"), (1, "c1", "dog"), (2, "c2", "yak")))
    write_classes(tmp_path / "new", {"01": 2, "02": 0, "03": 1})
    table = tmp_path / "new.csv"
    table.write_text("id,folder,name\n0,01,yak\n1,02,c0\n2,03,Dog\n")
    found = evaluated(f"{tmp_path / 'new'}@{table}", Reader(3), listed)
    assert (found.name, found.num_images, found.top1) == ("new", 3, 100.0)
    table.write_text("id,folder,name\n0,01,yak\n1,02,cow\n2,03,dog\n")
    with pytest.raises(
        DataError, match="1 of its 3 classes are not the model's .02.; fix the class map"
    ):
        evaluated(f"{tmp_path / 'new'}@{table}", Reader(3), listed)
    table.write_text("id,folder,name\n0,01,yak\n1,02,cat\n2,03,c0\n")
    with pytest.raises(DataError, match="two of its folders are the same class"):
        evaluated(f"{tmp_path / 'new'}@{table}", Reader(3), listed)


def test_folders_join_by_name_without_a_map(tmp_path: Path) -> None:
    listed = ClassMap(((0, "c0", "cat"), (1, "c1", "brown dog")))
    write_classes(tmp_path / "named", {"brown_dog": 1, "Cat": 0})
    assert evaluated(str(tmp_path / "named"), Reader(2), listed).top1 == 100.0
    three = ClassMap((*listed, (2, "c2", "yak")))
    with pytest.raises(
        DataError, match="it lacks 1 of the model's 3 classes .c2.; write subset=PATH"
    ):
        evaluated(str(tmp_path / "named"), Reader(3), three)


def test_unreadable_images_are_counted_and_left_out(tmp_path: Path) -> None:
    own = subset_wnids("r")[:100]
    write_classes(tmp_path, numbers_of(own), each=2)
    (tmp_path / own[3] / f"{own[3]}_0.JPEG").write_bytes(b"\xff\xd8 torn")
    found = evaluated(f"imagenet-r={tmp_path}")
    assert (found.num_images, found.skipped, found.top1) == (199, 1, 100.0)


def test_objectnet_descriptions_equal_timms() -> None:
    """ObjectNet's descriptions are timm's, word for word; checked for those with several ids."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    number = {info.label_name_to_description(wnid): i for i, wnid in enumerate(info.label_names())}
    for _, text, ids in OBJECTNET.values():
        assert [number[part] for part in text.split("; ")] == ids


def test_test_sets_of_a_users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = ClassMap(((0, "cat", "cat"), (1, "dog", "dog")))
    write_classes(tmp_path / "own-images", {"cat": 0, "dog": 1})
    kind = "python:tests.evaluation.my_suites"
    found = evaluated(f"{kind}:folder={tmp_path / 'own-images'}", Reader(2), listed)
    assert (found.name, found.num_images, found.top1) == (f"{kind}:folder", 2, 100.0)
    found = evaluated(f"{kind}:own", Reader(2), listed)
    assert (found.name, found.num_images, found.top1) == ("own-images", 2, 100.0)
    with pytest.raises(
        UsageError, match="--suite python:tests.evaluation.my_suites:none: cannot im"
    ):
        evaluated(f"{kind}:none", Reader(2), listed)


def test_every_published_size_has_a_suite() -> None:
    assert set(PUBLISHED) == set(published()["sizes"])
    assert SUITES.names() == (*PUBLISHED, "subset")
    assert all(callable(SUITES[name]) for name in SUITES)
