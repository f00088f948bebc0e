"""Distances of two sets of images in a feature space, and the diversity of one set. Pure functions
of features in float64.

    W2(p, q)^2   = integral over t in (0, 1) of (F_p^-1(t) - F_q^-1(t))^2
                   (one dimension, exact by the quantiles)
    SW2(P, Q)^2  = mean over unit directions u of W2(<u, P>, <u, Q>)^2
                   (Bonneel et al. 2015; Rabin et al. 2011)
    MMD^2(P, Q)  = E k(x, x') + E k(y, y') - 2 E k(x, y), unbiased
                   (Gretton et al. 2012, eq. 3)
                   k(x, y) = exp(-|x - y|^2 / (2 h^2)), h the median distance within a reference set
    Vendi score  = exp(entropy of the eigenvalues of K / n), K the cosine kernel
                   (Friedman & Dieng 2023, arXiv 2210.02410)

The plug-in SW2 of two samples of one distribution is not 0. Hence a floor (the self-distance of two
halves), equal sizes in every comparison, and the corrected SW2^2 = SW2^2 - half the two
self-distances: the bias comes from the variances of the sample quantiles, which are in both terms
and cancel. Like the unbiased MMD^2, the corrected SW2^2 can be negative by chance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def directions(dim: int, count: int, seed: int = 0) -> Tensor:
    """Draw unit vectors, uniform on the sphere; float64 [dim, count]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(dim, count, dtype=torch.float64, generator=generator)
    return normal / normal.norm(dim=0)


def median_distance(x: Tensor) -> float:
    """Return the median distance of two different rows of `x` [n, F]: the kernel's bandwidth."""
    return _pairs(x).median().item()


def gaussian_kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """Gaussian kernel of `a` [n, F] and `b` [m, F]; float64 [n, m]."""
    return (squared_distances(a, b) / (-2 * bandwidth**2)).exp()


def mmd2(aa: Tensor, bb: Tensor, ab: Tensor, in_a: Tensor, in_b: Tensor) -> Tensor:
    """Unbiased MMD^2 of parts of two samples, from the kernel within and between the whole samples;
    may be negative.

    aa [n, n], bb [m, m], ab [n, m]: the kernel. in_a bool [R, n], in_b bool [R, m]: the rows of
    each of R comparisons, at least two of each. Returns float64 [R].
    """

    def within(kernel: Tensor, part: Tensor) -> Tensor:
        size = part.sum(dim=1)
        return ((part @ kernel * part).sum(dim=1) - part @ kernel.diagonal()) / (size * (size - 1))

    a, b = in_a.double(), in_b.double()
    between = (a @ ab * b).sum(dim=1) / (a.sum(dim=1) * b.sum(dim=1))
    return within(aa, a) + within(bb, b) - 2 * between


class Halves(NamedTuple):
    """Random disjoint halves of a sample; both bool [R, n] with n // 2 true entries a row."""

    first: Tensor
    second: Tensor


def halves(n: int, resamples: int, seed: int) -> Halves:
    """Draw `resamples` random splits of n >= 2 rows.

    The spread of a statistic over halves of n rows is, to first order, its standard error over n
    rows: n / 2 rows double the variance, and drawing without repetition halves it.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(resamples, n, generator=generator).argsort(dim=1).argsort(dim=1)
    return Halves(order < n // 2, (order >= n // 2) & (order < n // 2 * 2))


class Projected:
    """Sample projected on all directions and sorted once; the sorted part of a subset is then a
    selection.
    """

    def __init__(self, x: Tensor, along: Tensor) -> None:
        self.values, self.order = (x.double() @ along).T.contiguous().sort(dim=1)  # [P, n]

    def part(self, rows: Tensor) -> Tensor:
        """Return the sorted values of the rows in `rows` bool [n]; [P, rows.sum()]."""
        return self.values[rows[self.order]].view(len(self.values), -1)


def squared_sw2_of_sorted(a: Tensor, b: Tensor) -> Tensor:
    """Squared SW2 of two samples of equal size, sorted along each direction, [P, m] each; scalar."""
    return (a - b).square().mean()


def vendi_score(x: Tensor) -> float:
    """Vendi score of features [n, F]: 1 if all have one direction, n (at most F) if all are
    orthogonal.
    """
    x = torch.nn.functional.normalize(x.double(), dim=1)
    # Both products have the same positive eigenvalues; take the smaller one.
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    share = torch.linalg.eigvalsh(gram).clamp(min=0)
    share = share / share.sum()
    return torch.special.entr(share).sum().exp().item()


def mean_distance(x: Tensor) -> float:
    """Return the mean distance of two different rows of `x` [n, F]."""
    return _pairs(x).mean().item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances float64 [n, m] of a [n, F] and b [m, F], by a matrix product: float64 keeps
    enough digits.
    """
    a, b = a.double(), b.double()
    return (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * (a @ b.T)).clamp(min=0)


def _pairs(x: Tensor) -> Tensor:
    """Return the distances of different rows, [n (n - 1) / 2]."""
    row, column = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    return squared_distances(x, x)[row, column].sqrt()
