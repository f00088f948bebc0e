"""Objectives against their formulas in float64 NumPy, and the rule of the filter."""

import pytest

torch = pytest.importorskip("torch")
import numpy as np

from dad_fast.config.schema import LossConfig
from dad_fast.methods.distances import dist, l2
from dad_fast.methods.losses import (
    distillation,
    keep_mask,
    objective,
    smooth,
    soft_cross_entropy,
)
from dad_fast.methods.registry import DISTANCES, METHODS, Images

B, C = 6, 7
NAMES = [name for name in METHODS if METHODS[name].terms]
KINDS = {"clean": Images.CLEAN, "dad": Images.ATTACK_TEACHER, "dat": Images.ATTACK_STUDENT}
RANDOM = np.random.default_rng(0)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def np_ce(logits, targets, weight=None):
    return float(
        ((-(targets * log_softmax(logits)).sum(-1)) * (1 if weight is None else weight)).sum() / B
    )


def np_kd(student, teacher, t, weight=None):
    p, q = log_softmax(teacher / t), log_softmax(student / t)
    return float(
        t * t * ((np.exp(p) * (p - q)).sum(-1) * (1 if weight is None else weight)).sum() / B
    )


def np_l2(student, teacher, t, weight=None):
    losses = []
    for s, u in zip(student, teacher, strict=True):
        losses.append(0.5 * np.mean(((s - s.mean()) - (u - u.mean())) ** 2))
    return float((np.array(losses) * (1 if weight is None else weight)).sum() / B)


def np_dist(student, teacher, t, weight=None):
    """DIST, image by image and class by class; within classes over the kept images alone."""
    q, p = np.exp(log_softmax(student / t)), np.exp(log_softmax(teacher / t))
    kept = np.ones(B, bool) if weight is None else weight > 0

    def one_minus(a, b):
        a, b = a - a.mean(), b - b.mean()
        return 1 - (a @ b) / (np.sqrt(a @ a) * np.sqrt(b @ b) + 1e-8)

    between = sum(one_minus(q[i], p[i]) for i in range(B) if kept[i]) / B
    within = sum(one_minus(q[kept, c], p[kept, c]) for c in range(C)) / C * kept.mean()
    return float(t * t * (between + within))


FORMULAS = {"kl": np_kd, "l2": np_l2, "dist": np_dist}


def draw():
    logits = {
        name: RANDOM.normal(0, 3, (B, C))
        for name in ("student_clean", "student_dad", "student_dat", "teacher_clean", "teacher_dad")
    }
    targets = RANDOM.dirichlet(np.ones(C), B)
    keep = np.array([1.0, 0, 1, 1, 0, 1])
    return logits, targets, keep


def objective_of(method, weights, logits, targets, keep, fused):
    """The objective, given logits by name such as student_dad."""
    by_model = {"student": {}, "teacher": {}}
    for name, tensor in logits.items():
        model, kind = name.split("_")
        by_model[model][KINDS[kind]] = tensor
    every = dict.fromkeys(Images, targets)
    models = by_model["student"], by_model["teacher"]
    return objective(METHODS[method], weights, *models, every, keep, fused=fused)


@pytest.mark.parametrize("distance", list(FORMULAS))
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_objective_equals_its_formula(method, filtered, fused, distance):
    raw, targets, keep = draw()
    w = LossConfig(
        ce=1.1, kd=0.5, dad=0.7, dat=0.9, aug=0.3, ard=0.6, temperature=4.0, distance=distance
    )
    weight = keep if filtered else None
    formula = FORMULAS[distance]
    ce = np_ce(raw["student_clean"], targets)
    kd = formula(raw["student_clean"], raw["teacher_clean"], 4.0)
    dad = formula(raw["student_dad"], raw["teacher_dad"], 4.0, weight)
    ard = formula(raw["student_dad"], raw["teacher_clean"], 4.0, weight)
    dat = np_ce(raw["student_dat"], targets)
    aug = np_ce(raw["student_dad"], targets, weight)
    expected = {
        "ce": 1.1 * ce,
        "kd": 1.1 * ce + 0.5 * kd,
        "aug-only": 1.1 * ce + 0.3 * aug,
        "dat": 1.1 * ce + 0.9 * dat,
        "dad": 1.1 * ce + 0.5 * kd + 0.7 * dad,
        "dat+dad": 1.1 * ce + 0.5 * kd + 0.7 * dad + 0.9 * dat,
        "ard": 1.1 * ce + 0.6 * ard,
        "rslad": 0.5 * kd + 0.6 * ard,
    }[method]
    total, parts = objective_of(
        method,
        w,
        {name: torch.from_numpy(value) for name, value in raw.items()},
        torch.from_numpy(targets),
        torch.from_numpy(keep) if filtered else None,
        fused,
    )
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert set(parts) == set(METHODS[method].term_names())


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("distance", list(FORMULAS))
def test_gradient_of_a_distance_equals_finite_differences(distance, filtered):
    """Central differences of the formula in NumPy, in float64, at every logit of the student."""
    raw, targets, keep = draw()
    weight = keep if filtered else None
    student = torch.from_numpy(raw["student_dad"]).requires_grad_(True)
    teacher = torch.from_numpy(raw["teacher_dad"])
    method, weights = METHODS["dad"], LossConfig(ce=0, kd=0, dad=1, distance=distance)
    mask = torch.from_numpy(keep) if filtered else None
    everything = {Images.CLEAN: student.detach(), Images.ATTACK_TEACHER: student}
    taught = {Images.CLEAN: teacher, Images.ATTACK_TEACHER: teacher}
    labels = dict.fromkeys(Images, torch.from_numpy(targets))
    objective(method, weights, everything, taught, labels, mask)[0].backward()

    formula, step = FORMULAS[distance], 1e-5
    expected = np.zeros((B, C))
    for place in np.ndindex(B, C):
        both = []
        for sign in (1, -1):
            moved = raw["student_dad"].copy()
            moved[place] += sign * step
            both.append(formula(moved, raw["teacher_dad"], 4.0, weight))
        expected[place] = (both[0] - both[1]) / (2 * step)
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_l2_is_the_limit_of_kl_for_high_temperatures():
    raw, _, _ = draw()
    student, teacher = torch.from_numpy(raw["student_dad"]), torch.from_numpy(raw["teacher_dad"])
    exact = l2(student, teacher, None, 4.0)
    assert distillation(student, teacher, 1e4).item() == pytest.approx(exact.item(), rel=1e-3)
    # A store keeps logits minus their maximum.
    shifted = teacher - teacher.amax(dim=1, keepdim=True)
    torch.testing.assert_close(l2(student, shifted, None, 4.0), exact)


@pytest.mark.parametrize("kept", [0, 1])
def test_dist_has_gradients_where_nothing_can_be_correlated(kept):
    """No image or one is kept, one of them with infinite logits, and a teacher is constant."""
    keep = torch.zeros(4)
    keep[:kept] = 1
    logits = torch.randn(4, 5)
    logits[3, 0] = float("inf")
    student = logits.half().requires_grad_(True)
    loss = dist(student, torch.zeros(4, 5), keep, 4.0)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(student.grad).all() and not student.grad[kept:].any()


def test_every_distance_is_tested():
    assert set(DISTANCES.own_names()) == set(FORMULAS)


def test_the_filter_divides_by_the_batch_not_by_the_kept():
    raw, _, _ = draw()
    student, teacher = torch.from_numpy(raw["student_dad"]), torch.from_numpy(raw["teacher_dad"])
    one = torch.zeros(B, dtype=torch.float64)
    one[2] = 1
    alone = distillation(student[2:3], teacher[2:3], 4.0)
    assert distillation(student, teacher, 4.0, one).item() == pytest.approx(alone.item() / B)


def test_filtered_samples_may_be_non_finite():
    student = torch.tensor([[1.0, 2.0], [float("inf"), 0.0]])
    loss = distillation(student, torch.ones(2, 2), 4.0, torch.tensor([1.0, 0.0]))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_kd_in_half_precision_is_computed_in_float32(temperature, scale):
    student, teacher = (
        scale * torch.randn(8, 100, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    student16, teacher16 = student.half(), teacher.half()
    exact = distillation(student16.double(), teacher16.double(), temperature)
    got = distillation(student16, teacher16, temperature)
    assert got.dtype == torch.float32 and torch.isfinite(got)
    # At high temperatures the divergence is a small difference of log-probabilities: an ulp of
    # those is what rounding costs.
    largest = max(
        (x.float() / temperature).log_softmax(-1).abs().max().item() for x in (student16, teacher16)
    )
    ulp = temperature**2 * torch.finfo(torch.float32).eps * largest
    assert got.item() == pytest.approx(exact.item(), rel=1e-5, abs=ulp)


def test_kd_gradient_is_the_temperature_times_the_difference_of_the_probabilities():
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher, t = torch.randn(3, 5, dtype=torch.float64), 4.0
    distillation(student, teacher, t).backward()
    expected = t * ((student / t).softmax(-1) - (teacher / t).softmax(-1)) / 3
    torch.testing.assert_close(student.grad, expected.detach())


def test_hard_labels_equal_one_hot():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(
        soft_cross_entropy(logits, labels), soft_cross_entropy(logits, one_hot)
    )
    torch.testing.assert_close(smooth(one_hot, 0.1).sum(-1), torch.ones(4))
    torch.testing.assert_close(
        soft_cross_entropy(logits, smooth(one_hot, 0.1)),
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1),
    )


def test_keep_mask_takes_either_of_two_mixed_labels():
    said = torch.nn.functional.one_hot(torch.tensor([0, 1, 2]), 3).float()
    assert keep_mask(said, torch.tensor([0, 0, 0])).tolist() == [1, 0, 0]
    assert keep_mask(said, torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])).tolist() == [1, 1, 0]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("temperature", [0.5, 4.0, 20.0])
def test_fused_objective_equals_plain(method, temperature):
    """Loss, parts and gradients, over methods, filter, weights, smoothing and temperatures."""
    for filtered in (True, False):
        for smoothing, w in (
            (0.0, (1.0, 0.5, 0.5, 1.0, 1.0, 0.5)),
            (0.1, (0.3, 2.0, 0.0, 0.7, 4.0, 2.0)),
        ):
            raw, targets, keep = draw()
            weights = LossConfig(
                **dict(zip(("ce", "kd", "dad", "dat", "aug", "ard"), w, strict=True)),
                temperature=temperature,
            )
            results = []
            for fused in (False, True):
                tensors = {k: torch.from_numpy(v).requires_grad_(True) for k, v in raw.items()}
                y = smooth(torch.from_numpy(targets), smoothing)
                mask = torch.from_numpy(keep) if filtered else None
                total, parts = objective_of(method, weights, tensors, y, mask, fused)
                total.backward()
                gradients = {
                    k: t.grad
                    for k, t in tensors.items()
                    if k.startswith("student") and t.grad is not None
                }
                results.append(
                    (total.detach(), {k: p.detach() for k, p in parts.items()}, gradients)
                )
            assert list(results[0][1]) == list(results[1][1]) == list(METHODS[method].term_names())
            torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
