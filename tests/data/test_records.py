"""Records: pure functions of (seed, epoch, sample) with timm's distributions and level ranges."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.policies import TRIVIAL_ARGUMENTS, parse_policy
from dad_fast.data.augment.policy import TimmOp
from dad_fast.data.augment.records import CUTMIX, MIXUP, NO_MIX, UNMIXED, mix_record, sample_record
from dad_fast.errors import UsageError
from dad_fast.keyed_random import Draws, sample_seeds
from dad_fast.methods.settings import resolve

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

FULL = AugmentConfig(vflip=0.2, aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0)
KNOWN_CROP = ((232, 117, 256, 233), "bicubic", True)
KNOWN_JITTER = [("brightness", 1.005743), ("color", 1.040834), ("contrast", 1.010119)]
KNOWN_MIX = (2, 0.826530612244898, (0, 68, 39, 167))
KNOWN_SEEDS = [2431782952858440772, 7923396070619191001]


@hypothesis.given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    img_size=st.integers(1, 300),
    seed=st.integers(-(2**40), 2**40),
    epoch=st.integers(0, 2**31),
    sample=st.integers(0, 2**31),
    crop=st.sampled_from(["random-resized", "center", "squash"]),
)
@hypothesis.example(width=1, height=1, img_size=1, seed=0, epoch=0, sample=0, crop="random-resized")
@hypothesis.example(
    width=6000, height=1, img_size=224, seed=0, epoch=0, sample=0, crop="random-resized"
)
@hypothesis.example(width=1, height=6000, img_size=224, seed=0, epoch=0, sample=0, crop="center")
def test_boxes_lie_inside_and_replay_is_equal(width, height, img_size, seed, epoch, sample, crop):
    aug = AugmentConfig(crop=crop, color_jitter=0.4, reprob=1.0, mixup=0.4, cutmix=1.0)
    record = sample_record(aug, img_size, seed, epoch, sample, width, height)
    left, top, w, h = record.crop
    assert left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height
    if crop == "squash":
        assert (w, h) == (width, height)
    if record.erase is not None:
        assert record.erase.top >= 0 and record.erase.top + record.erase.height <= img_size
        assert record.erase.left >= 0 and record.erase.left + record.erase.width <= img_size
    mix = mix_record(aug, img_size, seed, epoch, sample)
    y0, y1, x0, x1 = mix.box
    assert 0 <= y0 <= y1 <= img_size and 0 <= x0 <= x1 <= img_size and 0.0 <= mix.lam <= 1.0
    if mix.kind == CUTMIX:
        assert mix.lam == pytest.approx(1 - (y1 - y0) * (x1 - x0) / img_size**2)
    assert record == sample_record(aug, img_size, seed, epoch, sample, width, height)
    assert mix == mix_record(aug, img_size, seed, epoch, sample)


def test_a_record_is_plain_numbers_that_survive_json():
    record = sample_record(FULL, 224, 7, 3, 11, 500, 375)
    fields = dataclasses.asdict(record)
    assert json.loads(json.dumps(fields)) == json.loads(
        json.dumps(dataclasses.asdict(sample_record(FULL, 224, 7, 3, 11, 500, 375)))
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.hflip = True


def test_a_known_record_does_not_change():
    """Later resumes need the same stream, so a change here needs a note in the changelog."""
    record = sample_record(AugmentConfig(), 224, seed=1, epoch=2, sample=3, width=500, height=375)
    assert (record.crop, record.interpolation, record.hflip) == KNOWN_CROP
    assert [(op.name, round(op.value, 6)) for op in record.ops] == KNOWN_JITTER
    assert mix_record(FULL, 224, 1, 2, 3) == KNOWN_MIX
    assert sample_seeds(1, 2, np.array([3, 4])).tolist() == KNOWN_SEEDS


def test_seed_epoch_and_sample_each_matter_and_nothing_is_shared():
    base = (1, 2, 3)
    crops = {
        sample_record(AugmentConfig(), 224, *key, 4000, 3000).crop
        for key in (base, (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (1, 3, 2))
    }
    assert len(crops) == 6
    seeds = np.concatenate([sample_seeds(s, e, np.arange(2000)) for s in (0, 1) for e in (0, 1)])
    assert len(np.unique(seeds)) == 8000 and seeds.min() >= 0


def test_crops_have_timm_statistics():
    transforms = pytest.importorskip("timm.data.transforms")
    from PIL import Image

    image, count = Image.new("L", (640, 360)), 1500
    random.seed(0)
    theirs = np.array(
        [
            transforms.RandomResizedCropAndInterpolation.get_params(
                image, (0.08, 1.0), (3 / 4, 4 / 3)
            )
            for _ in range(count)
        ],
        float,
    )
    ours = np.array(
        [sample_record(AugmentConfig(), 224, 0, 0, i, 640, 360).crop for i in range(count)], float
    )[:, [1, 0, 3, 2]]
    for mine, timms in zip(ours.T, theirs.T, strict=True):
        spread = math.hypot(mine.std(), timms.std()) / math.sqrt(count)
        assert abs(mine.mean() - timms.mean()) < 4 * spread
        assert mine.std() == pytest.approx(timms.std(), rel=0.08)


def test_erasing_has_timm_statistics():
    torch = pytest.importorskip("torch")
    erasing = pytest.importorskip("timm.data.random_erasing")
    random.seed(0)
    eraser, count = erasing.RandomErasing(0.25, mode="const", device="cpu"), 1200
    theirs = [int((eraser(torch.ones(1, 64, 64)) == 0).sum()) for _ in range(count)]
    aug = AugmentConfig(reprob=0.25)
    erased = [sample_record(aug, 64, 0, 0, i, 64, 64).erase for i in range(count)]
    ours = [e.height * e.width if e else 0 for e in erased]
    assert np.mean(np.array(ours) > 0) == pytest.approx(0.25, abs=0.04)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.2)
    assert {e.fill for e in erased if e} == {"pixel"} and len({e.seed for e in erased if e}) == sum(
        e is not None for e in erased
    )


def test_flips_and_filters_follow_their_probabilities():
    records = [
        sample_record(AugmentConfig(hflip=0.5, vflip=0.25), 32, 0, 0, i, 64, 64)
        for i in range(2000)
    ]
    assert np.mean([r.hflip for r in records]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([r.vflip for r in records]) == pytest.approx(0.25, abs=0.04)
    assert np.mean([r.interpolation == "bicubic" for r in records]) == pytest.approx(0.5, abs=0.04)
    assert {
        sample_record(
            AugmentConfig(train_interpolation="bilinear"), 32, 0, 0, i, 64, 64
        ).interpolation
        for i in range(20)
    } == {"bilinear"}
    plain = sample_record(
        AugmentConfig(crop="center", hflip=0, color_jitter=0), 28, 0, 0, 0, 28, 28
    )
    assert (plain.crop, plain.ops, plain.erase, plain.hflip) == ((0, 0, 28, 28), (), None, False)


def test_jitter_is_torchvisions_and_unused_with_a_policy():
    orders = set()
    for i in range(100):
        ops = sample_record(AugmentConfig(color_jitter=0.4), 32, 0, 0, i, 64, 64).ops
        assert all(0.6 <= op.value <= 1.4 for op in ops)
        orders.add(tuple(op.name for op in ops))
    assert len(orders) == 6
    with_policy = AugmentConfig(aa="rand-m9-n1-p0")
    assert sample_record(with_policy, 32, 0, 0, 0, 64, 64).ops == ()


def sample_ops(policy, draws, interpolation=""):
    return policy.sample(draws, interpolation, 64).ops


def test_randaugment_choice_and_probability():
    pytest.importorskip("timm")
    policy = parse_policy("rand-m9-mstd0.5-inc1")
    names = [op.name for op in policy.ops]
    assert policy.num_ops == policy.most_ops == 2 and policy.weights is None
    settings = {dataclasses.replace(op, name="") for op in policy.ops}
    assert settings == {TimmOp("", 0.5, 9.0, 0.5, 10.0)}
    assert len(names) == 15 and "SolarizeIncreasing" in names
    drawn = [sample_ops(policy, Draws(0, 1, 0, i)) for i in range(3000)]
    assert np.mean([len(ops) for ops in drawn]) == pytest.approx(1.0, abs=0.05)
    assert any(len(ops) == 2 and ops[0].name == ops[1].name for ops in drawn)  # with replacement
    rotations = [op.value for ops in drawn for op in ops if op.name == "rotate"]
    assert np.mean(np.abs(rotations)) == pytest.approx(27, abs=0.4) and np.std(
        np.abs(rotations)
    ) == pytest.approx(1.5, abs=0.3)
    assert np.mean(np.array(rotations) > 0) == pytest.approx(0.5, abs=0.12)
    assert {op.interpolation for ops in drawn for op in ops if op.name == "shear_x"} == {
        "bilinear",
        "bicubic",
    }
    assert {op.interpolation for ops in drawn for op in ops if op.name == "equalize"} == {""}
    assert {
        op.interpolation
        for i in range(200)
        for op in sample_ops(policy, Draws(0, 1, 0, i), "bilinear")
    } <= {"", "bilinear"}


def test_weighted_policies_are_drawn_without_replacement():
    pytest.importorskip("timm")
    policy = parse_policy("rand-m9-n3-p1-tweights")
    drawn = [sample_ops(policy, Draws(0, 1, 0, i)) for i in range(500)]
    assert all(len({op.name for op in ops}) == 3 for ops in drawn)
    share = np.mean([any(op.name == "rotate" for op in ops) for ops in drawn])
    assert share > 0.6  # a third of the first draw's weight
    uniform = parse_policy("rand-m10-n1-p1-mstd101")
    levels = [
        abs(op.value) / 30
        for i in range(2000)
        for op in sample_ops(uniform, Draws(0, 1, 0, i))
        if op.name == "rotate"
    ]
    assert np.mean(levels) == pytest.approx(0.5, abs=0.1) and max(levels) > 0.9


@pytest.mark.parametrize(
    "text",
    [
        *("rand-m9-foo", "rand-x9", "rand-", "rand-m9-tother", "randm9", "cutout"),
        *("rand-m9-mstdinf", "rand-m9.5", "rand-n1.5", "rand-inc0.5", "rand-mmax9.5"),
        *("original-m9", "v0-", "v1", "3a-mstdinf", "ta-m9", "trivial", "augment"),
        *("augmix-w0", "augmix-b1", "augmix-a0", "augmix-m3-n2", "augmixm3"),
        *("pixmix-k0", "pixmix-b0", "pixmix-m11", "pixmix-all2", "prime-w0", "prime-m3"),
    ],
)
def test_invalid_policies_name_the_flag(text):
    with pytest.raises(UsageError, match="--aa"):
        parse_policy(text)


def test_a_policy_that_cannot_be_read_is_refused_with_the_settings():
    with pytest.raises(UsageError, match="--aa origin: no such policy; did you mean orig"):
        resolve("demo", None, ["augment.aa=origin"])
    with pytest.raises(UsageError, match="--loader dali: DALI does not average chains"):
        resolve("demo", None, ["augment.aa=augmix-m3", "data.loader=dali"])
    for policy, lack in (("pixmix-k4", "mix in pictures"), ("prime", "average chains")):
        with pytest.raises(UsageError, match=f"--loader dali: DALI does not {lack}"):
            resolve("demo", None, [f"augment.aa={policy}", "data.loader=dali"])


@pytest.mark.parametrize("text", ["v0", "v0r", "original", "originalr", "3a", "v0-mstd0.5"])
def test_autoaugment_draws_timms_sub_policies(text):
    """Operations, probabilities and magnitudes are timm's, and each sub-policy is as likely."""
    timm = pytest.importorskip("timm.data.auto_augment")
    policy = parse_policy(text)
    theirs = timm.auto_augment_transform(text, {})

    def settings_of(sub_policies):
        return [
            [(op.name, op.prob, op.magnitude, op.magnitude_std) for op in sub]
            for sub in sub_policies
        ]

    assert settings_of(policy.sub_policies) == settings_of(theirs.policy)
    drawn = [sample_ops(policy, Draws(0, 1, 0, i)) for i in range(3000)]
    expected = np.mean([sum(op.prob for op in sub) for sub in policy.sub_policies])
    assert np.mean([len(ops) for ops in drawn]) == pytest.approx(expected, abs=0.06)
    if text == "3a":
        assert {len(ops) for ops in drawn} == {1}
        radii = [op.value for ops in drawn for op in ops if op.name == "gaussian_blur"]
        assert 0.1 <= min(radii) < 0.2 and 1.9 < max(radii) < 2.0
        jittered = AugmentConfig(aa="3a", color_jitter=0.3)
        names = [op.name for op in sample_record(jittered, 32, 0, 0, 1, 64, 64).ops]
        assert sorted(names[1:]) == ["brightness", "color", "contrast"]


def test_augmix_draws_chains_weights_and_share():
    pytest.importorskip("timm")
    policy = parse_policy("augmix-m5-w4")
    assert len(policy.ops) == 13 and policy.most_ops == 0
    # timm draws the magnitude evenly up to m, unless mstd is given.
    settings = {dataclasses.replace(op, name="") for op in policy.ops}
    assert settings == {TimmOp("", 1.0, 5.0, math.inf, 10.0)}
    drawn = [policy.sample(Draws(0, 1, 0, i), "", 64).blend for i in range(1000)]
    lengths = [len(chain) for found in drawn for chain in found.chains]
    assert {len(found.chains) for found in drawn} == {4} and set(lengths) == {1, 2, 3}
    weights = np.array([found.weights for found in drawn])
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    # Dirichlet(1, 1, 1, 1) has mean 1/4 and variance 3/80; Beta(1, 1) is even on [0, 1].
    assert weights.mean(axis=0) == pytest.approx(0.25, abs=0.025)
    assert weights.var(axis=0) == pytest.approx(3 / 80, abs=0.006)
    assert np.mean([found.share for found in drawn]) == pytest.approx(0.5, abs=0.04)
    ops = [op for found in drawn for chain in found.chains for op in chain]
    moved = [abs(op.value) for op in ops if op.name == "translate_x"]
    assert 0.13 < max(moved) <= 0.15
    deep = parse_policy("augmix-d2").sample(Draws(0, 1, 0, 0), "", 64).blend
    assert [len(chain) for chain in deep.chains] == [2, 2, 2]


def test_trivialaugment_draws_every_operation_and_magnitude_alike():
    policy = parse_policy("ta")
    drawn = [sample_ops(policy, Draws(0, 1, 0, i)) for i in range(14 * 300)]
    counts = Counter(ops[0].name if ops else "identity" for ops in drawn)
    assert len(counts) == len(TRIVIAL_ARGUMENTS) == 14
    assert min(counts.values()) > 230 and max(counts.values()) < 370
    angles = {round(ops[0].value, 6) for ops in drawn if ops and ops[0].name == "rotate"}
    assert angles <= {round(sign * 4.5 * bin, 6) for sign in (1, -1) for bin in range(31)}
    assert len(angles) > 50
    assert sample_ops(parse_policy("trivial-wide"), Draws(0, 1, 0, 5)) == drawn[5]


def test_mixing_draws():
    both = AugmentConfig(mixup=0.8, cutmix=1.0, mixup_prob=0.5, mixup_switch_prob=0.25)
    kinds = np.array([mix_record(both, 64, 0, 0, i).kind for i in range(4000)])
    assert np.mean(kinds == NO_MIX) == pytest.approx(0.5, abs=0.03)
    assert np.mean(kinds == CUTMIX) == pytest.approx(0.125, abs=0.02)
    assert mix_record(AugmentConfig(), 64, 0, 0, 0) == UNMIXED
    assert mix_record(AugmentConfig(cutmix=1.0), 64, 0, 0, 0).kind == CUTMIX
    assert mix_record(AugmentConfig(mixup=1.0), 64, 0, 0, 0).kind == MIXUP


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 5.0])
def test_beta_has_its_moments(alpha):
    values = np.array([Draws(0, 2, 0, i).beta(alpha) for i in range(4000)])
    variance = 1.0 / (4.0 * (2.0 * alpha + 1.0))
    assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
    assert values.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert values.var() == pytest.approx(variance, rel=0.1)
