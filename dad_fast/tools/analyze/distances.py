"""How far two sets of images lie apart in a feature space, and how diverse one is. Pure functions of features, all in float64.

    W2(p, q)^2   = integral over t in (0, 1) of (F_p^-1(t) - F_q^-1(t))^2           one dimension, exact by the quantiles
    SW2(P, Q)^2  = mean over unit directions u of W2(<u, P>, <u, Q>)^2              Bonneel et al. 2015; Rabin et al. 2011
    MMD^2(P, Q)  = E k(x, x') + E k(y, y') - 2 E k(x, y), unbiased                  Gretton et al. 2012, eq. 3
                   k(x, y) = exp(-|x - y|^2 / (2 h^2)), h the median distance within a reference set
    Vendi score  = exp(entropy of the eigenvalues of K / n), K the cosine kernel    Friedman & Dieng 2023 (arXiv 2210.02410)

A sample of m lies at a distance from its own distribution, so the plug-in SW2 of two samples of one distribution is not 0. Hence the
self-distance of two halves as a floor, equal sizes in every comparison, and SW2^2 less half the two self-distances: the variances of the
sample quantiles, which make the bias, are in both and cancel. That one can be negative by chance, as the unbiased MMD^2 can.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def wasserstein2_1d(a: Tensor, b: Tensor) -> Tensor:
    """Squared W2 between the samples in the columns of `a` [n, P] and `b` [m, P], any n and m; float64 [P].

    The quantile functions are steps at multiples of 1/n and 1/m: on the pieces between all of these both are constant.
    """
    a, b = a.double().sort(dim=0).values, b.double().sort(dim=0).values
    n, m = len(a), len(b)
    if n == m:
        return (a - b).square().mean(dim=0)
    steps_a, steps_b = (
        torch.arange(1, n + 1, device=a.device) * m,
        torch.arange(1, m + 1, device=a.device) * n,
    )  # in units of 1/(n m)
    ends = torch.cat((steps_a, steps_b)).unique()
    lengths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    return lengths @ (a[(ends - 1) // m] - b[(ends - 1) // n]).square()


def directions(dim: int, count: int, seed: int = 0) -> Tensor:
    """Unit vectors, uniform on the sphere; float64 [dim, count]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(dim, count, dtype=torch.float64, generator=generator)
    return normal / normal.norm(dim=0)


def sliced_wasserstein2(a: Tensor, b: Tensor, along: Tensor) -> Tensor:
    """Squared SW2 of the samples `a` [n, F] and `b` [m, F] over the directions `along` [F, P]; float64 scalar.

    Its error over directions is that of a mean of P values; the same directions for all comparisons leave their order alone.
    """
    return wasserstein2_1d(a.double() @ along, b.double() @ along).mean()


def median_distance(x: Tensor) -> float:
    """The median distance of two different rows of `x` [n, F]: the kernel's bandwidth."""
    return _pairs(x).median().item()


def gaussian_kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """float64 [n, m]"""
    return (squared_distances(a, b) / (-2 * bandwidth**2)).exp()


def mmd2(aa: Tensor, bb: Tensor, ab: Tensor, in_a: Tensor, in_b: Tensor) -> Tensor:
    """Unbiased MMD^2 of parts of two samples, from the kernel within and between the whole samples; may be negative.

    aa [n, n], bb [m, m], ab [n, m]: the kernel. in_a bool [R, n], in_b bool [R, m]: which rows take part in each of R comparisons, two or
    more of each. Returns float64 [R].
    """

    def within(kernel: Tensor, part: Tensor) -> Tensor:
        size = part.sum(dim=1)
        return ((part @ kernel * part).sum(dim=1) - part @ kernel.diagonal()) / (size * (size - 1))

    a, b = in_a.double(), in_b.double()
    between = (a @ ab * b).sum(dim=1) / (a.sum(dim=1) * b.sum(dim=1))
    return within(aa, a) + within(bb, b) - 2 * between


class Halves(NamedTuple):
    """Random halves of a sample, without repetition; both bool [R, n], each row with n // 2 of them, disjoint."""

    first: Tensor
    second: Tensor


def halves(n: int, resamples: int, seed: int) -> Halves:
    """`resamples` random splits of n >= 2 rows.

    The spread of a statistic over halves of n rows is, to first order, its standard error over n rows: it has the variance of n / 2
    rows, which drawing without repetition halves.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(resamples, n, generator=generator).argsort(dim=1).argsort(dim=1)
    return Halves(order < n // 2, (order >= n // 2) & (order < n // 2 * 2))


class Projected:
    """A sample along all directions, sorted once, so that sorting a part of it is a selection."""

    def __init__(self, x: Tensor, along: Tensor) -> None:
        self.values, self.order = (x.double() @ along).T.contiguous().sort(dim=1)  # [P, n]

    def part(self, rows: Tensor) -> Tensor:
        """The sorted values of the rows in `rows` bool [n]; [P, number of them]."""
        return self.values[rows[self.order]].view(len(self.values), -1)


def squared_sw2_of_sorted(a: Tensor, b: Tensor) -> Tensor:
    """Squared SW2 of two samples of one size that are sorted along each direction, [P, m] each; scalar."""
    return (a - b).square().mean()


def vendi_score(x: Tensor) -> float:
    """How many different images a set of features [n, F] is worth: 1 where all point one way, n (at most F) where all are orthogonal."""
    x = torch.nn.functional.normalize(x.double(), dim=1)
    share = torch.linalg.eigvalsh(x.T @ x if len(x) > x.shape[1] else x @ x.T).clamp(
        min=0
    )  # the two have the same positive eigenvalues
    share = share / share.sum()
    return torch.special.entr(share).sum().exp().item()


def mean_distance(x: Tensor) -> float:
    """The mean distance of two different rows of `x` [n, F]."""
    return _pairs(x).mean().item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """float64 [n, m] of a [n, F] and b [m, F]; by a product of matrices, which in float64 costs no digit that matters here."""
    a, b = a.double(), b.double()
    return (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * (a @ b.T)).clamp(min=0)


def _pairs(x: Tensor) -> Tensor:
    """The distances of different rows, [n (n - 1) / 2]."""
    row, column = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    return squared_distances(x, x)[row, column].sqrt()
