"""ImageNet-C: the mCE, both preprocessings, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("timm")

from imagenet_folders import Reader, write_image
from suites import CPU, PARTIAL, WNIDS, OfMap, evaluated, numbers_of, shuffled_map

from dad_fast.config.schema import DataConfig, EvalConfig
from dad_fast.data.augment.view import View
from dad_fast.errors import DataError
from dad_fast.evaluation.runner import evaluate, open_suites, protocol
from dad_fast.evaluation.suites.base import as_eval_set
from dad_fast.evaluation.suites.imagenet import imagenet_classes
from dad_fast.evaluation.suites.published import C_VIEWS


def write_c(root: Path, chosen: dict[str, int], wrong) -> Path:
    """Write two images per class for every corruption and severity.

    wrong(corruption, severity, i): whether an image is shown as the next class.
    """
    published = Path(__file__).parents[2] / "dad_fast/evaluation/suites/published.json"
    names = json.loads(published.read_text())["alexnet_errors"]["values"]
    groups = {"fog": "weather", "snow": "weather", "gaussian_noise": "noise"}
    for corruption in names:
        for severity in range(1, 6):
            for j, (wnid, number) in enumerate(chosen.items()):
                for i in range(2):
                    shown = number + wrong(corruption, severity, 2 * j + i)
                    write_image(
                        root
                        / groups.get(corruption, "")
                        / corruption
                        / str(severity)
                        / wnid
                        / f"{i}.JPEG",
                        shown,
                    )
    return root


# Of six images of each corruption how many are shown as another class, by severity.
ERRORS = {
    "gaussian_noise": (0, 1, 2, 3, 4),
    "snow": (1, 1, 1, 1, 1),
    "jpeg_compression": (6, 6, 6, 6, 6),
}


@pytest.fixture(scope="module")
def c_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wrong = lambda name, s, i: int(i < ERRORS.get(name, (0,) * 5)[s - 1])  # noqa: E731
    return write_c(tmp_path_factory.mktemp("c"), numbers_of(WNIDS[10:13]), wrong)


def test_mce_by_hand(c_root: Path) -> None:
    """The mCE by the paper's formula, written out."""
    found = evaluated(f"imagenet-c={c_root}", batch_size=7)
    ce = {
        "gaussian_noise": (10 / 30) / 0.886428,
        "snow": (5 / 30) / 0.866816,
        "jpeg_compression": 1 / 0.606500,
    }
    assert found.mce == pytest.approx(100 * sum(ce.values()) / 15)
    assert found.top1 == pytest.approx(100 * (1 - (10 + 5 + 30) / (75 * 6)))
    assert found.num_images == 6 and len(found.records) == 75 * 6 and found.by_severity == ()
    assert found.by_corruption["gaussian_noise"]["top1"] == pytest.approx(
        [100 * (6 - k) / 6 for k in range(5)]
    )
    assert (
        found.by_corruption["snow"]["ce"] == pytest.approx(100 * ce["snow"])
        and found.by_corruption["fog"]["ce"] == 0
    )
    low, high = found.mce_interval
    assert low < found.mce < high


def test_mce_with_an_unreadable_image(c_root: Path) -> None:
    """One torn copy of the 75 costs that image in that folder, not the mCE."""
    path = c_root / "brightness" / "2" / WNIDS[10] / "0.JPEG"
    whole = path.read_bytes()
    before = evaluated(f"imagenet-c={c_root}")
    path.write_bytes(whole[:30])
    try:
        suite = open_suites(
            [f"imagenet-c={c_root}"], DataConfig(max_bad_share=0.5), imagenet_classes(), PARTIAL
        )[0]
        found = evaluate(
            Reader(),
            suite.source,
            view=View(8, 1.0, "bilinear"),
            batch_size=9,
            workers=0,
            device=CPU,
        )
    finally:
        path.write_bytes(whole)
    assert (found.skipped, found.num_images, len(found.records)) == (1, 6, 449)
    assert (
        found.mce == pytest.approx(before.mce) and found.mce_interval[0] < found.mce_interval[1]
    )  # over the five that are whole


def test_model_of_other_classes_has_no_mce(c_root: Path) -> None:
    listed = shuffled_map(WNIDS[11:13] + WNIDS[500:503])
    found = evaluated(
        f"imagenet-c={c_root}", OfMap([WNIDS.index(wnid) for wnid in listed.folders]), listed
    )
    assert (
        found.num_images == 4
        and found.mce is None
        and found.by_corruption["fog"]["top1"] == [100.0] * 5
    )
    assert "only 2 of 3 classes are the model's" in found.protocol


def test_both_preprocessings_of_imagenet_c(c_root: Path) -> None:
    """At 8 px the pictures are used as they are, or resized to 9 and cropped, as the result notes."""
    looks = {}
    for name in ("none", "resize256"):
        found = evaluated(
            f"imagenet-c={c_root}",
            options=EvalConfig(allow_partial=True, c_preprocessing=name),
            view=View(8, 0.5, "bilinear"),
        )
        assert found.top1 == pytest.approx(90.0)
        looks[name] = found.protocol.split(";")[0]
    assert looks == {
        "none": "c-preprocessing none: resize 8 bicubic, crop 8",
        "resize256": "c-preprocessing resize256: resize 9 bicubic, crop 8",
    }
    assert C_VIEWS["resize256"] == (224 / 256, "bicubic")
    of_224 = as_eval_set(
        open_suites([f"imagenet-c={c_root}"], DataConfig(), imagenet_classes(), PARTIAL)[0].source
    )
    assert protocol(of_224, View(224, 1.0, "bicubic")).startswith(
        "c-preprocessing none: 224 px as they are; "
    )


def test_incomplete_imagenet_c_is_refused(c_root: Path) -> None:
    (c_root / "weather" / "fog" / "3").rename(c_root / "elsewhere")
    try:
        with pytest.raises(
            DataError,
            match=r"imagenet-c: 74 of 75 CORRUPTION/SEVERITY folders in .* \(without fog/3\); finish",
        ):
            evaluated(f"imagenet-c={c_root}", options=EvalConfig())
        found = evaluated(f"imagenet-c={c_root}")
    finally:
        (c_root / "elsewhere").rename(c_root / "weather" / "fog" / "3")
    assert (
        found.mce is None
        and found.by_corruption["fog"]["ce"] is None
        and found.by_corruption["snow"]["ce"] > 0
    )
    assert (
        "without fog/3" in found.protocol
        and "partial: 3 of 1,000 class folders, 6 of 50,000 images" in found.protocol
    )
