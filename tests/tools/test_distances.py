"""Distances between samples of features, against scipy, closed forms for Gaussians, and explicit
sums.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dad_fast.tools.analyze.distances import (
    Projected,
    directions,
    gaussian_kernel,
    halves,
    mean_distance,
    median_distance,
    mmd2,
    squared_distances,
    squared_sw2_of_sorted,
    vendi_score,
)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def wasserstein2_1d(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared W2 between the samples in the columns of `a` [n, P] and `b` [m, P], any n and m;
    float64 [P].

    The quantile functions are steps at multiples of 1/n and 1/m: both are constant between any two
    neighbours of these.
    """
    a, b = a.double().sort(dim=0).values, b.double().sort(dim=0).values
    n, m = len(a), len(b)
    # In units of 1/(n m).
    steps_a, steps_b = torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n
    ends = torch.cat((steps_a, steps_b)).unique()
    lengths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    return lengths @ (a[(ends - 1) // m] - b[(ends - 1) // n]).square()


def sliced_wasserstein2(a: torch.Tensor, b: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Squared SW2 of the samples `a` [n, F] and `b` [m, F] over the directions `along` [F, P];
    float64 scalar.
    """
    return wasserstein2_1d(a.double() @ along, b.double() @ along).mean()


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 5), (1, 9), (12, 18), (20, 9)])
def test_one_dimension_is_the_optimal_transport_cost(n, m):
    """Compare with an independent solver: an assignment between copies of the points."""
    optimize = pytest.importorskip("scipy.optimize")
    a, b = normal(n, 3, seed=1), normal(m, 3, seed=2)
    found = wasserstein2_1d(a, b)
    common = math.lcm(n, m)
    for p in range(3):
        cost = (
            a[:, p].numpy().repeat(common // n)[:, None] - b[:, p].numpy().repeat(common // m)
        ) ** 2
        rows, columns = optimize.linear_sum_assignment(cost)
        assert found[p].item() == pytest.approx(cost[rows, columns].mean(), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 31)])
def test_one_dimension_against_scipy_by_the_difference_of_quantiles(n, m):
    """If one quantile function is above the other, W2^2 of shifted samples follows from scipy's W1."""
    stats = pytest.importorskip("scipy.stats")
    a = normal(n, 1, seed=3)
    b = normal(m, 1, seed=4) + 20
    w1 = stats.wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert w1 == pytest.approx((b.mean() - a.mean()).item())
    centred = wasserstein2_1d(a - a.mean(), b - b.mean())
    assert wasserstein2_1d(a, b).item() == pytest.approx(w1**2 + centred.item(), rel=1e-12)
    grid = (np.arange(n * m) + 0.5) / (n * m)
    quantiles = [np.quantile(x[:, 0].numpy(), grid, method="inverted_cdf") for x in (a, b)]
    assert wasserstein2_1d(a, b).item() == pytest.approx(
        np.mean((quantiles[0] - quantiles[1]) ** 2), rel=1e-9
    )


def test_one_dimension_of_equal_samples_and_of_multiples_is_zero():
    a = normal(6, 2, seed=5)
    assert wasserstein2_1d(a, a.flip(0)).abs().max() == 0
    assert wasserstein2_1d(a, a.repeat(3, 1)).abs().max() == 0
    assert wasserstein2_1d(a.float(), a.float() + 1).allclose(
        torch.ones(2, dtype=torch.float64), atol=1e-6
    )


def test_sliced_distance_of_gaussians_is_the_closed_form():
    """W2^2 of N(m, s^2) and N(n, t^2) is (m - n)^2 + (s - t)^2, here along every direction."""
    dim, n, along = 5, 10_000, directions(5, 200, seed=1)
    mixing, shift = normal(dim, dim, seed=7), normal(dim, seed=8)
    a = normal(n, dim, seed=9) @ mixing.T
    b = 0.5 * normal(n // 2, dim, seed=10) + shift
    deviation_a = (along.T @ mixing @ mixing.T @ along).diagonal().sqrt()
    expected = ((along.T @ shift) ** 2 + (deviation_a - 0.5) ** 2).mean()
    # The sampling error at n = 5,000.
    assert sliced_wasserstein2(a, b, along).item() == pytest.approx(expected.item(), rel=0.03)
    # Over all directions the mean shift is |shift|^2 / dim, and 200 directions come near it.
    moved = sliced_wasserstein2(a, a + shift, along).item()
    assert moved == pytest.approx((shift @ shift / dim).item(), rel=0.15)


def test_directions_are_unit_vectors_and_uniform():
    along = directions(8, 4000, seed=0)
    assert along.norm(dim=0).allclose(torch.ones(4000, dtype=torch.float64))
    assert (along @ along.T / 4000 - torch.eye(8) / 8).abs().max() < 0.01
    assert along.equal(directions(8, 4000, seed=0)) and not along.equal(directions(8, 4000, seed=1))


def test_mmd_equals_the_written_out_sums_and_is_unbiased():
    a, b = normal(9, 3, seed=1), normal(6, 3, seed=2) + 0.5
    h = median_distance(a)
    distances = sorted(np.linalg.norm(a[i] - a[j]) for i in range(9) for j in range(i))
    assert h == pytest.approx(distances[(len(distances) - 1) // 2])

    def k(x, y):
        return math.exp(
            -sum((p - q) ** 2 for p, q in zip(x.tolist(), y.tolist(), strict=True)) / (2 * h * h)
        )

    in_a, in_b = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    in_a[1, 4:], in_b[1, ::2] = False, False
    found = mmd2(
        gaussian_kernel(a, a, h), gaussian_kernel(b, b, h), gaussian_kernel(a, b, h), in_a, in_b
    )
    for r in range(2):
        x, y = a[in_a[r]], b[in_b[r]]
        n, m = len(x), len(y)
        xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        assert found[r].item() == pytest.approx(
            xx + yy - 2 * sum(k(p, q) for p in x for q in y) / (n * m), abs=1e-12
        )

    # 100 pairs of samples of 10 of one distribution: the mean is 0, and some are negative.
    same = normal(2000, 3, seed=3)
    parts = torch.zeros(100, 2000, dtype=torch.bool)
    for r in range(100):
        parts[r, 10 * r : 10 * r + 10] = True
    kernel = gaussian_kernel(same, same, 1.0)
    values = mmd2(kernel, kernel, kernel, parts, parts.roll(1000, 1))
    assert values.min() < 0 and abs(values.mean()) < 3 * values.std() / 10


def test_mmd_of_gaussians_is_the_closed_form():
    """E k(x, y) for x, y ~ N(., I), difference d: (h^2 / (h^2 + 2))^(F/2) exp(-d^2 / (2 (h^2 +
    2))).
    """
    n, dim, h, d = 1500, 2, 1.3, 0.8
    a, b = normal(n, dim, seed=1), normal(n, dim, seed=2)
    b[:, 0] += d
    everything = torch.ones(1, n, dtype=torch.bool)
    found = mmd2(
        gaussian_kernel(a, a, h),
        gaussian_kernel(b, b, h),
        gaussian_kernel(a, b, h),
        everything,
        everything,
    )
    expected = 2 * (h**2 / (h**2 + 2)) ** (dim / 2) * (1 - math.exp(-(d**2) / (2 * (h**2 + 2))))
    assert found.item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("n", [2, 9, 40])
def test_halves_are_disjoint_equal_and_random(n):
    first, second = halves(n, 200, seed=0)
    assert first.shape == second.shape == (200, n)
    assert (
        (first.sum(dim=1) == n // 2).all()
        and (second.sum(dim=1) == n // 2).all()
        and not (first & second).any()
    )
    assert (first.float().mean(dim=0) - (n // 2) / n).abs().max() < 0.2


def test_spread_over_halves_is_the_standard_error_of_the_whole():
    x = normal(400, seed=1)
    first, _ = halves(400, 4000, seed=2)
    over_halves = (first.double() @ x / 200).std().item()
    assert over_halves == pytest.approx(x.std().item() / math.sqrt(400), rel=0.05)


def test_parts_of_a_sorted_sample_are_sorted_samples_of_the_part():
    a, b, along = normal(30, 4, seed=1), normal(30, 4, seed=2), directions(4, 16)
    rows = halves(30, 1, seed=0).first[0]
    part_a, part_b = Projected(a, along).part(rows), Projected(b, along).part(rows)
    assert part_a.allclose((a[rows] @ along).T.sort(dim=1).values, rtol=1e-12, atol=1e-14)
    assert squared_sw2_of_sorted(part_a, part_b).item() == pytest.approx(
        sliced_wasserstein2(a[rows], b[rows], along).item()
    )


def test_corrected_distance_is_unbiased():
    """For one distribution the plug-in distance is far from 0, the corrected one is not; for two
    Gaussians it is exact.
    """
    along, m = directions(6, 64), 40
    plain, corrected, moved = [], [], []
    for seed in range(60):
        a1, a2, b1, b2 = (normal(m, 6, seed=1000 + 4 * seed + i) for i in range(4))
        own = (sliced_wasserstein2(a1, a2, along) + sliced_wasserstein2(b1, b2, along)).item() / 2
        plain.append(sliced_wasserstein2(a1, b1, along).item())
        corrected.append(plain[-1] - own)
        own = (
            sliced_wasserstein2(a1, a2, along) + sliced_wasserstein2(2 * b1, 2 * b2, along)
        ).item() / 2
        moved.append(sliced_wasserstein2(a1, 2 * b1, along).item() - own)
    error = np.std(corrected) / math.sqrt(60)
    assert abs(np.mean(corrected)) < 3 * error and np.mean(plain) > 10 * error
    assert np.mean(moved) == pytest.approx(1.0, abs=0.1)  # (1 - 2)^2


def test_distances_by_a_product_of_matrices_keep_their_digits():
    a, b = normal(40, 12, seed=1) + 5, normal(30, 12, seed=2) + 5
    assert (
        squared_distances(a, b)
        .sqrt()
        .allclose(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"), rtol=1e-12)
    )
    assert (
        squared_distances(a, a).diagonal().abs().max() < 1e-12
        and squared_distances(a, a).min() >= 0
    )
    assert mean_distance(a) == pytest.approx(torch.pdist(a).mean().item())


def test_diversity():
    same = torch.nn.functional.normalize(normal(1, 8, seed=1), dim=1).expand(20, -1)
    assert vendi_score(same) == pytest.approx(1) and mean_distance(same) == pytest.approx(
        0, abs=1e-6
    )
    assert vendi_score(torch.eye(8).repeat(5, 1)) == pytest.approx(8)
    assert vendi_score(torch.eye(8)[:2].repeat(5, 1)) == pytest.approx(2)
    assert mean_distance(torch.eye(3)) == pytest.approx(math.sqrt(2))
