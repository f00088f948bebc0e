"""PixMix: keyed rounds and pictures, mixing by the paper's formulas, the user's own pictures."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from dad_fast.cli.main import main
from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.apply_pixmix import mix_pictures, render
from dad_fast.data.augment.execute import execute
from dad_fast.data.augment.fractals import fractal
from dad_fast.data.augment.operations import apply
from dad_fast.data.augment.pixmix import (
    FRACTALS,
    OPERATIONS,
    Picture,
    PixMix,
    PixMixed,
    Round,
    picture_files,
    picture_fingerprint,
)
from dad_fast.data.augment.policies import parse_policy
from dad_fast.data.augment.policy import Op
from dad_fast.data.augment.records import sample_record
from dad_fast.errors import DataError
from dad_fast.keyed_random import Draws

PICTURE = Picture("", 3, ((0, 0, 40), (200, 30, 10), (20, 250, 90), (255, 255, 255)), 0.25, 0.75)
NOISE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def drawn(text="pixmix", count=1500, pictures=""):
    policy = parse_policy(text, pictures)
    return [policy.sample(Draws(0, 1, 0, i), "", 224).blend for i in range(count)]


def test_rounds_follow_the_papers_distributions():
    found = drawn("pixmix-k3-b4")
    counts = np.bincount([len(blend.rounds) for blend in found])
    assert len(counts) == 4 and counts == pytest.approx(375, rel=0.2)
    rounds = [turn for blend in found for turn in blend.rounds]
    assert np.mean([blend.first is None for blend in found]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([turn.op is None for turn in rounds]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([turn.kind == "add" for turn in rounds]) == pytest.approx(0.5, abs=0.05)
    # Means of Beta(4, 1) and Beta(1, 4) are 4/5 and 1/5.
    means = np.array([(turn.own, turn.other) for turn in rounds if turn.other > 0])
    differences = np.array([(turn.own, turn.other) for turn in rounds if turn.other < 0])
    assert len(means) / len(rounds) == pytest.approx(0.5, abs=0.05)
    assert means.mean(axis=0) == pytest.approx((0.8, 0.2), abs=0.02)
    assert differences.mean(axis=0) == pytest.approx((1.2, -0.2), abs=0.02)
    # Beta(4, 1) has variance 4 / (25 · 6).
    assert means.var(axis=0) == pytest.approx(4 / 150, abs=0.005)


def test_magnitude_and_operations_are_those_of_the_name():
    ops = [
        turn.op
        for blend in drawn("pixmix-m10-all0")
        for turn in blend.rounds
        if turn.op is not None
    ]
    assert {op.name for op in ops} == {name for name, _ in OPERATIONS[:9]}
    assert max(abs(op.value) for op in ops if op.name == "rotate") == 29
    assert max(abs(op.value) for op in ops if op.name == "shear_x") == pytest.approx(0.3, abs=0.03)
    weak = [blend.first for blend in drawn() if blend.first is not None]
    assert {op.name for op in weak} == {name for name, _ in OPERATIONS}
    assert max(abs(op.value) for op in weak if op.name == "translate_y") * 224 == pytest.approx(7)
    assert parse_policy("pixmix").policy == PixMix(4, 4, 1, True, "")


@pytest.mark.parametrize(("own", "other"), [(0.8, 0.2), (1.3, -0.3), (0.1, 0.9)])
def test_mixing_adds_and_multiplies(own, other):
    x, y = NOISE / 255.0, np.asarray(render(PICTURE, 24)) / 255.0
    added = ((2 * x - 1) * own + (2 * y - 1) * other + 1) / 2
    multiplied = (2 * x) ** own * (2 * y).clip(1e-37) ** other / 2
    for kind, expected in (("add", added), ("multiply", multiplied)):
        blend = PixMixed(None, (Round(kind, own, other, None),), PICTURE)
        found = np.asarray(mix_pictures(Image.fromarray(NOISE), blend))
        assert np.abs(found - expected.clip(0, 1) * 255).max() <= 0.51


def test_a_round_can_take_the_image_itself_and_rounds_follow_each_other():
    image = Image.fromarray(NOISE)
    first, op = Op("invert", 0.0, ""), Op("posterize", 2, "")
    rounds = (Round("add", 0.5, 0.5, op), Round("add", 1.0, 0.0, None))
    found = np.asarray(mix_pictures(image, PixMixed(first, rounds, PICTURE)), float)
    expected = (255 - NOISE.astype(float) + np.asarray(apply(op, image))) / 2
    assert np.abs(found - expected).max() <= 0.51
    assert mix_pictures(image, PixMixed(None, (), PICTURE)) is image


def test_fractals_are_a_fixed_set_of_pictures_with_structure():
    some = [fractal(number) for number in range(0, 60, 10)]
    for density in some:
        filled = np.mean(density > 0)
        assert density.dtype == np.uint8 and density.max() == 255 and 0.1 < filled < 0.9
        # Neighbours are alike, unlike those of noise.
        values = density.astype(float)
        assert np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1] > 0.3
    for density in some[1:]:
        overlap = (
            np.minimum(density > 0, some[0] > 0).sum() / np.maximum(density > 0, some[0] > 0).sum()
        )
        assert overlap < 0.8
    kept = fractal(20).copy()
    fractal.cache_clear()
    np.testing.assert_array_equal(fractal(20), kept)
    assert {blend.picture.fractal for blend in drawn()} <= set(range(FRACTALS))


def test_a_record_replays_and_is_plain_numbers():
    aug = AugmentConfig(aa="pixmix", reprob=1.0)
    image = Image.fromarray(NOISE)
    seen = set()
    for sample in range(8):
        record = sample_record(aug, 16, 5, 1, sample, 24, 24)
        assert record.ops == () and record == sample_record(aug, 16, 5, 1, sample, 24, 24)
        assert json.dumps(dataclasses.asdict(record))
        pixels = execute(record, image)
        assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, execute(record, image))
        seen.add(pixels.tobytes())
    assert len(seen) == 8


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one below; and a file that is none."""
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    Image.new("RGB", (300, 200), (255, 0, 0)).save(pictures / "red.png")
    Image.new("RGB", (40, 90), (0, 0, 255)).save(pictures / "more" / "blue.jpg", quality=95)
    (pictures / "notes.txt").write_text("text")
    return pictures


def test_own_pictures_replace_the_fractals(folder):
    found = {blend.picture.file for blend in drawn(count=60, pictures=str(folder))}
    assert found == {str(folder / "red.png"), str(folder / "more" / "blue.jpg")}
    picture = Picture(str(folder / "red.png"), 0, (), 0.9, 0.1)
    assert np.asarray(render(picture, 20)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 400
    fingerprint = picture_fingerprint(str(folder))
    folder.joinpath("red.png").rename(folder / "crimson.png")
    picture_files.cache_clear()
    assert picture_fingerprint(str(folder)) != fingerprint


def test_a_damaged_picture_is_named(folder):
    file = folder / "more" / "blue.jpg"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(DataError, match="--pixmix-pictures: .*blue.jpg: .*; remove it"):
        render(Picture(str(file), 0, (), 0.5, 0.5), 16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "--pixmix-pictures .*nowhere: no such folder"),
        ("", None, "--pixmix-pictures .*: no image in it"),
        ("", b"none", "--pixmix-pictures: .*a.png: not an image; remove it"),
    ],
)
def test_bad_pictures_are_one_line_before_anything_is_written(
    tmp_path, capsys, name, content, message
):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    if content:
        (pictures / "a.png").write_bytes(content)
    flags = ["--aa", "pixmix", "--pixmix-pictures", str(pictures / name), "--max-steps", "1"]
    output = tmp_path / "out"
    assert main(["train", "--preset", "demo", "--method", "ce", *flags, "-o", str(output)]) == 4
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(message, error), error
    assert not output.exists()


def test_a_store_that_is_older_than_a_setting_has_its_default():
    from types import SimpleNamespace

    from dad_fast.store.join import Stored, view_settings

    augment = AugmentConfig(aa="ta")
    older = view_settings(augment)
    del older["pixmix_pictures"]
    manifest = SimpleNamespace(settings={"augment": older, "img_size": 32})
    targets = SimpleNamespace(manifest=manifest, folder="store")
    Stored._check_views(None, targets, 32, augment, False)
    changed = dataclasses.replace(augment, pixmix_pictures="pictures")
    with pytest.raises(DataError, match="pixmix_pictures:  in the store, pictures here"):
        Stored._check_views(None, targets, 32, changed, False)
