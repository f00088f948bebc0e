"""The published test sets in their true layouts: order of labels, masks, borders, several right ids, what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

from imagenet_folders import OBJECTNET, Reader, wnids, write_classes, write_image, write_objectnet

from dad_fast.config.schema import DataConfig, EvalConfig
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluate.imagenet import imagenet_classes, join, subset_wnids
from dad_fast.evaluate.layouts import C_VIEWS
from dad_fast.evaluate.result import Result
from dad_fast.evaluate.runner import evaluate, open_suites, protocol
from dad_fast.evaluate.sources import as_judged

WNIDS = wnids()
CPU = torch.device("cpu")
PARTIAL = EvalConfig(allow_partial=True)


def judge(
    name: str, model: torch.nn.Module | None = None, classes: ClassMap | None = None, options: EvalConfig = PARTIAL, **more
) -> Result:
    suite = open_suites([name], DataConfig(data_dir="."), classes or imagenet_classes(), options)[0]
    settings = {"img_size": 8, "crop_pct": 1.0, "interpolation": "bilinear", "batch_size": 64, "workers": 0} | more
    return evaluate(model or Reader(), suite.source, name=suite.name, device=torch.device("cpu"), **settings)


def numbers_of(folders) -> dict[str, int]:
    return {wnid: WNIDS.index(wnid) for wnid in folders}


@pytest.mark.parametrize("kind", ["imagenet", "imagenet-sketch", "imagenet-stylized"])
def test_wnid_folders(tmp_path: Path, kind: str) -> None:
    inside = {"imagenet": "val", "imagenet-sketch": "sketch", "imagenet-stylized": ""}[kind]
    chosen = WNIDS[::97]
    write_classes(tmp_path / inside, numbers_of(chosen), each=2)
    found = judge(f"{kind}={tmp_path}")
    assert (found.name, found.num_images, found.top1, found.top5) == (kind, 22, 100.0, 100.0)
    assert "partial: 11 of 1,000 class folders, 22 of 5" in found.protocol and "logits of" not in found.protocol
    wrong = judge(f"{kind}={tmp_path}", Reader(offset=1, margin=1.0))
    assert (wrong.top1, wrong.top5) == (0.0, 100.0)  # another class is preferred, and nothing masks it


def test_v2_folders_are_numbers_not_names(tmp_path: Path) -> None:
    """All 1000 folders: in string order (0, 1, 10, 100 …) 988 of them would be another class."""
    folders = {str(i): i for i in range(1000)}
    assert sum(sorted(folders)[i] == str(i) for i in range(1000)) == 12
    write_classes(tmp_path / "imagenetv2-matched-frequency-format-val", folders)
    found = judge(f"imagenet-v2={tmp_path}", batch_size=500)
    assert found.num_images == 1000 and found.top1 == 100.0
    assert found.protocol == "resize 8 bilinear, crop 8; partial: 1,000 of 1,000 class folders, 1,000 of 10,000 images"
    shutil.rmtree(tmp_path)
    write_classes(tmp_path, numbers_of(WNIDS[100:105]))  # as some copies are
    assert judge(f"imagenet-v2={tmp_path}").top1 == 100.0


@pytest.mark.parametrize("letter", ["a", "r"])
def test_a_and_r_are_judged_among_their_200_classes(tmp_path: Path, letter: str) -> None:
    own = subset_wnids(letter)
    write_classes(tmp_path, numbers_of(own))
    others = {i for i in range(1000) if WNIDS[i] not in own}
    # Preferring a class that is not of the 200 costs nothing, preferring one of the 200 does.
    offset = 1
    shifted = np.mean([((WNIDS.index(w) + offset) % 1000) in others for w in own])
    assert 0.3 < shifted < 0.95
    found = judge(f"imagenet-{letter}={tmp_path}", Reader(offset=offset, margin=1.0))
    assert found.num_images == 200 and found.top1 == pytest.approx(100 * shifted)
    assert "logits of the 200 classes" in found.protocol
    assert judge(f"imagenet-{letter}={tmp_path}").top1 == 100.0
    # Softmax over 200 outputs, of which one is 5 and the others 0.
    confidence = np.exp(5) / (np.exp(5) + 199)
    assert judge(f"imagenet-{letter}={tmp_path}").nll == pytest.approx(-np.log(confidence))


def test_the_200_are_of_the_1000_and_differ() -> None:
    a, r = subset_wnids("a"), subset_wnids("r")
    assert len(set(a)) == len(set(r)) == 200 and set(a) | set(r) <= set(WNIDS)
    assert "n01498041" in a and "n01443537" in r and "n01443537" not in a  # stingray; goldfish is in R only


def test_a_folder_of_the_wrong_set_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, numbers_of(WNIDS[:40]))
    with pytest.raises(DataError, match="class folders are not of it, such as n01440764"):
        judge(f"imagenet-a={tmp_path}")


def test_objectnet(tmp_path: Path) -> None:
    root = write_objectnet(tmp_path / "objectnet-1.0")
    for path in (root, root / "images", tmp_path):
        found = judge(f"objectnet={path}")
        assert (found.num_images, found.top1) == (10, 100.0), path  # the two classes that ImageNet has not are left out
    assert "any of a folder's ids is right" in found.protocol and "partial: 5 of 5 class folders, 10 of 18,574 images" in found.protocol
    # Any of a folder's ids is right, and nothing is masked: 5 more than 409 is none of a clock's ids, 121 more is the digital clock.
    assert judge(f"objectnet={root}", Reader(offset=5, margin=1.0)).top1 == 0.0
    clock = judge(f"objectnet={root}", Reader(offset=121, margin=1.0)).records
    assert clock["correct"].reshape(5, 2)[0].tolist() == [1, 1] and clock["correct"].sum() == 2


def test_objectnets_border_is_cut_off(tmp_path: Path) -> None:
    """The red line of two pixels would say another number."""
    root = write_objectnet(tmp_path)
    sizes = {path.stat().st_size for path in (root / "images").rglob("*.png")}
    assert sizes and judge(f"objectnet={root}").top1 == 100.0
    write_classes(root / "images", {"banana": 954}, 2, ".png", border=3)  # a third pixel remains
    assert judge(f"objectnet={root}", img_size=10).top1 < 100.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: shutil.rmtree(m), "has a folder mappings beside images"),
        (lambda m: (m / "objectnet_to_imagenet_1k.json").unlink(), "objectnet_to_imagenet_1k.json: not there"),
        (lambda m: (m / "objectnet_to_imagenet_1k.json").write_text('{"Banana": "ananas"}'), "'ananas' of 'Banana' is no class of Imag"),
        (lambda m: (m / "objectnet_to_imagenet_1k.json").write_text("{"), "not readable as JSON"),
        (lambda m: (m / "folder_to_objectnet_label.json").write_text('["a"]'), "not a table of texts"),
        (lambda m: (m / "folder_to_objectnet_label.json").write_text('{"a": "B"}'), "no label in common"),
    ],
)  # fmt: skip
def test_objectnets_mappings_are_checked(tmp_path: Path, damage, message: str) -> None:
    root = write_objectnet(tmp_path)
    damage(root / "mappings")
    with pytest.raises(DataError, match=message) as caught:
        judge(f"objectnet={root}")
    assert "\n" not in str(caught.value)


def write_c(root: Path, chosen: dict[str, int], wrong) -> Path:
    """Two images a class of every corruption and severity; `wrong(corruption, severity, i)` says which are shown as the next class."""
    names = json.loads((Path(__file__).parents[1] / "dad_fast" / "evaluate" / "published.json").read_text())["alexnet_errors"]["values"]
    groups = {"fog": "weather", "snow": "weather", "gaussian_noise": "noise"}
    for corruption in names:
        for severity in range(1, 6):
            for j, (wnid, number) in enumerate(chosen.items()):
                for i in range(2):
                    shown = number + wrong(corruption, severity, 2 * j + i)
                    write_image(root / groups.get(corruption, "") / corruption / str(severity) / wnid / f"{i}.JPEG", shown)
    return root


# Of six images of each corruption how many are shown as another class, by severity.
ERRORS = {"gaussian_noise": (0, 1, 2, 3, 4), "snow": (1, 1, 1, 1, 1), "jpeg_compression": (6, 6, 6, 6, 6)}


@pytest.fixture(scope="module")
def c_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wrong = lambda name, s, i: int(i < ERRORS.get(name, (0,) * 5)[s - 1])  # noqa: E731
    return write_c(tmp_path_factory.mktemp("c"), numbers_of(WNIDS[10:13]), wrong)


def test_mce_by_hand(c_root: Path) -> None:
    """The mCE by the paper's formula, written out."""
    found = judge(f"imagenet-c={c_root}", batch_size=7)
    ce = {"gaussian_noise": (10 / 30) / 0.886428, "snow": (5 / 30) / 0.866816, "jpeg_compression": 1 / 0.606500}
    assert found.mce == pytest.approx(100 * sum(ce.values()) / 15)
    assert found.top1 == pytest.approx(100 * (1 - (10 + 5 + 30) / (75 * 6)))
    assert found.num_images == 6 and len(found.records) == 75 * 6 and found.by_severity == ()
    assert found.by_corruption["gaussian_noise"]["top1"] == pytest.approx([100 * (6 - k) / 6 for k in range(5)])
    assert found.by_corruption["snow"]["ce"] == pytest.approx(100 * ce["snow"]) and found.by_corruption["fog"]["ce"] == 0
    low, high = found.mce_interval
    assert low < found.mce < high


def test_mce_with_an_unreadable_image(c_root: Path) -> None:
    """One torn copy of the 75 costs that image in that folder, not the mCE."""
    path = c_root / "brightness" / "2" / WNIDS[10] / "0.JPEG"
    whole = path.read_bytes()
    before = judge(f"imagenet-c={c_root}")
    path.write_bytes(whole[:30])
    try:
        suite = open_suites([f"imagenet-c={c_root}"], DataConfig(max_bad_share=0.5), imagenet_classes(), PARTIAL)[0]
        found = evaluate(Reader(), suite.source, img_size=8, crop_pct=1.0, interpolation="bilinear", batch_size=9, workers=0, device=CPU)
    finally:
        path.write_bytes(whole)
    assert (found.skipped, found.num_images, len(found.records)) == (1, 6, 449)
    assert found.mce == pytest.approx(before.mce) and found.mce_interval[0] < found.mce_interval[1]  # over the five that are whole


def test_no_mce_for_a_model_of_other_classes(c_root: Path) -> None:
    listed = shuffled_map(WNIDS[11:13] + WNIDS[500:503])
    found = judge(f"imagenet-c={c_root}", OfMap([WNIDS.index(wnid) for wnid in listed.folders]), listed)
    assert found.num_images == 4 and found.mce is None and found.by_corruption["fog"]["top1"] == [100.0] * 5
    assert "only 2 of 3 classes are the model's" in found.protocol


def test_both_preprocessings_of_c(c_root: Path) -> None:
    """What is named is what is done: at 8 px the pictures are as they are, or resized to 9 and cropped."""
    looks = {}
    for name in ("none", "resize256"):
        found = judge(f"imagenet-c={c_root}", options=EvalConfig(allow_partial=True, c_preprocessing=name), crop_pct=0.5)
        assert found.top1 == pytest.approx(90.0)
        looks[name] = found.protocol.split(";")[0]
    assert looks == {
        "none": "c-preprocessing none: resize 8 bicubic, crop 8",
        "resize256": "c-preprocessing resize256: resize 9 bicubic, crop 8",
    }
    assert C_VIEWS["resize256"] == (224 / 256, "bicubic")
    of_224 = as_judged(open_suites([f"imagenet-c={c_root}"], DataConfig(), imagenet_classes(), PARTIAL)[0].source)
    assert protocol(of_224, (224, 1.0, "bicubic")).startswith("c-preprocessing none: 224 px as they are; ")


def test_c_that_is_not_whole(c_root: Path) -> None:
    (c_root / "weather" / "fog" / "3").rename(c_root / "elsewhere")
    try:
        with pytest.raises(DataError, match=r"imagenet-c: 74 of 75 CORRUPTION/SEVERITY folders in .* \(without fog/3\); finish"):
            judge(f"imagenet-c={c_root}", options=EvalConfig())
        found = judge(f"imagenet-c={c_root}")
    finally:
        (c_root / "elsewhere").rename(c_root / "weather" / "fog" / "3")
    assert found.mce is None and found.by_corruption["fog"]["ce"] is None and found.by_corruption["snow"]["ce"] > 0
    assert "without fog/3" in found.protocol and "partial: 3 of 1,000 class folders, 6 of 50,000 images" in found.protocol


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("imagenet", r"imagenet: 3 of 1,000 class folders, 6 of 50,000 images in .* \(without n0\d+, .* more\); finish the download"),
        ("imagenet-r", r"imagenet-r: 3 of 200 class folders, 6 of 30,000 images"),
        ("imagenet-a", r"imagenet-a: 3 of 200 class folders, 6 of 7,500 images"),
    ],
)
def test_half_downloaded_folders_are_named(tmp_path: Path, kind: str, message: str) -> None:
    chosen = [wnid for wnid in subset_wnids("a") if wnid in subset_wnids("r")][:3]
    write_classes(tmp_path, numbers_of(chosen), each=2)
    (
        tmp_path / sorted(set(subset_wnids(kind[-1]) if kind != "imagenet" else WNIDS) - set(chosen))[0]
    ).mkdir()  # an empty one does not count
    with pytest.raises(DataError, match=message) as caught:
        judge(f"{kind}={tmp_path}", options=EvalConfig())
    assert "--allow-partial" in str(caught.value) and "\n" not in str(caught.value)
    assert judge(f"{kind}={tmp_path}").num_images == 6


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("imagenet-a={}/none", DataError, "no such folder; expected 200 class folders such as n01498041 with 7,500 images"),
        ("imagenet-v2={}", DataError, "none of its class folders is there .it has cats, dogs.; expected 1,000 class folders 0 … 999"),
        ("imagenet-c={}", DataError, "no CORRUPTION/SEVERITY folders; expected CORRUPTION/SEVERITY/WNID folders of 15"),
        ("objectnet={}", DataError, "none of its class folders is there"),
        ("imagenet-s={}", UsageError, "'imagenet-s' is no kind of test set; did you mean imagenet-s"),
        ("imagenet-a=", UsageError, "name its folder, as in imagenet-a=/data/imagenet-a"),
    ],
)  # fmt: skip
def test_wrong_names_and_folders(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    write_classes(tmp_path, {"cats": 0, "dogs": 1})
    with pytest.raises(error, match=message) as caught:
        judge(name.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_bare_name_is_the_folder_of_that_name_in_the_data(tmp_path: Path) -> None:
    write_classes(tmp_path / "imagenet-r", numbers_of(subset_wnids("r")[:4]))
    write_classes(tmp_path / "val", numbers_of(subset_wnids("r")[:2]))
    two = ClassMap(tuple((i, wnid, wnid) for i, wnid in enumerate(subset_wnids("r")[:2])))
    suites = open_suites(["val", "imagenet-r", "contrast:2"], DataConfig(data_dir=str(tmp_path)), two, PARTIAL)
    assert [suite.name for suite in suites] == ["val", "imagenet-r", "contrast:2"] and suites[2].source is suites[0].source
    assert "only 2 of 4 classes are the model's" in suites[1].source.note and len(suites[1].source) == 2


def shuffled_map(chosen: list[str], seed: int = 0, names: bool = False) -> ClassMap:
    """A model's class list in another order than ImageNet's; with `names` its folders are called by name."""
    of = imagenet_classes()
    order = np.random.default_rng(seed).permutation(len(chosen))
    text = [of.names[of.folders.index(chosen[i])] for i in order]
    return ClassMap(tuple((k, text[k].replace(" ", "_") if names else chosen[i], text[k]) for k, i in enumerate(order)))


class OfMap(torch.nn.Module):
    """A model of the classes `listed`, whose images say ImageNet's numbers."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        self.output = torch.full((1024,), len(numbers), dtype=torch.int64)
        self.output[torch.tensor(numbers)] = torch.arange(len(numbers))
        self.size = len(numbers)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        full = Reader()(pixels)
        return torch.nn.functional.one_hot(self.output[full.argmax(1)], self.size + 1)[:, : self.size].float() * 5


@pytest.mark.parametrize("names", [False, True])
def test_a_model_of_some_classes_in_another_order(tmp_path: Path, names: bool) -> None:
    a = list(subset_wnids("a"))
    write_classes(tmp_path, numbers_of(a), each=1)
    own = a[:30] + [wnid for wnid in WNIDS if wnid not in a][:20]
    listed = shuffled_map(own, names=names)
    wnid_of = {name: wnid for wnid, name in zip(imagenet_classes().folders, imagenet_classes().names, strict=True)}
    numbers = [WNIDS.index(wnid_of[name]) for name in listed.names]
    found = judge(f"imagenet-a={tmp_path}", OfMap(numbers), listed)
    assert (found.num_images, found.top1) == (30, 100.0)
    assert "logits of the 30 classes; only 30 of 200 classes are the model's" in found.protocol
    assert (found.records["prediction"] < 50).all() and len(set(found.records["label"].tolist())) == 30


def test_a_model_without_any_of_the_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, numbers_of(WNIDS[:2]))
    cats = ClassMap(((0, "siamese", "siamese"), (1, "mog", "mog")))
    with pytest.raises(DataError, match=r"none of the model's 2 classes \(siamese, mog\) is one of its 2") as caught:
        judge(f"imagenet={tmp_path}", Reader(2), cats)
    assert "\n" not in str(caught.value)


def test_join_by_name_only_where_it_is_of_one_class() -> None:
    model = ClassMap(((0, "crane", "crane"), (1, "Egyptian_cat", "x"), (2, "0002", "tench")))
    wanted = [("n02012849", "crane"), ("n03126707", "crane"), ("n02124075", "egyptian cat"), ("n01440764", "Tench")]
    assert join(model, wanted) == [None, None, 1, 2]
    assert join(ClassMap(((0, "n01440764", "a"), (1, "crane", "b"))), wanted) == [None, None, None, 0]  # wnids: no guessing by name


def test_subset_of_a_plain_folder(tmp_path: Path) -> None:
    listed = ClassMap(tuple((i, f"c{i}", f"class {i}") for i in range(6)))
    write_classes(tmp_path / "part", {"c4": 4, "c1": 1})
    with pytest.raises(DataError, match="lacks 4 of the 6 listed classes"):
        judge(str(tmp_path / "part"), Reader(6), listed)
    found = judge(f"subset={tmp_path / 'part'}", Reader(6, offset=1, margin=1.0), listed)
    assert (found.name, found.top1, found.protocol) == ("part", 100.0, "resize 8 bilinear, crop 8; logits of the 2 classes")
    assert judge(f"subset={tmp_path / 'part'}", Reader(6, offset=3, margin=1.0), listed).top1 == 0.0  # 1 + 3 and 4 + 3 - 6 compete
    write_classes(tmp_path / "part", {"yak": 5})
    with pytest.raises(DataError, match="1 of its 3 classes are not the model's .yak.; remove them, or say what they are"):
        judge(f"subset={tmp_path / 'part'}", Reader(6), listed)


def test_a_folder_with_a_class_map(tmp_path: Path) -> None:
    listed = ClassMap(((0, "c0", "cat"), (1, "c1", "dog"), (2, "c2", "yak")))
    write_classes(tmp_path / "new", {"01": 2, "02": 0, "03": 1})
    table = tmp_path / "new.csv"
    table.write_text("id,folder,name\n0,01,yak\n1,02,c0\n2,03,Dog\n")
    found = judge(f"{tmp_path / 'new'}@{table}", Reader(3), listed)
    assert (found.name, found.num_images, found.top1) == ("new", 3, 100.0)
    table.write_text("id,folder,name\n0,01,yak\n1,02,cow\n2,03,dog\n")
    with pytest.raises(DataError, match="1 of its 3 classes are not the model's .02.; mend the class map"):
        judge(f"{tmp_path / 'new'}@{table}", Reader(3), listed)
    table.write_text("id,folder,name\n0,01,yak\n1,02,cat\n2,03,c0\n")
    with pytest.raises(DataError, match="two of its folders are the same class"):
        judge(f"{tmp_path / 'new'}@{table}", Reader(3), listed)


def test_folders_called_by_name_join_without_a_map(tmp_path: Path) -> None:
    listed = ClassMap(((0, "c0", "cat"), (1, "c1", "brown dog")))
    write_classes(tmp_path / "named", {"brown_dog": 1, "Cat": 0})
    assert judge(str(tmp_path / "named"), Reader(2), listed).top1 == 100.0
    three = ClassMap((*listed, (2, "c2", "yak")))
    with pytest.raises(DataError, match="it lacks 1 of the model's 3 classes .c2.; write subset=PATH"):
        judge(str(tmp_path / "named"), Reader(3), three)


def test_unreadable_images_are_counted_not_judged(tmp_path: Path) -> None:
    own = subset_wnids("r")[:100]
    write_classes(tmp_path, numbers_of(own), each=2)
    (tmp_path / own[3] / f"{own[3]}_0.JPEG").write_bytes(b"\xff\xd8 torn")
    found = judge(f"imagenet-r={tmp_path}")
    assert (found.num_images, found.skipped, found.top1) == (199, 1, 100.0)


def test_objectnet_table_is_whole() -> None:
    """The descriptions that ObjectNet writes are timm's, word for word (checked here for those with several names or ids)."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    number = {info.label_name_to_description(wnid): i for i, wnid in enumerate(info.label_names())}
    for _, text, ids in OBJECTNET.values():
        assert [number[part] for part in text.split("; ")] == ids
