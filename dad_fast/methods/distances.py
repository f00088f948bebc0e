"""Distances between the logits of student and teacher besides T^2 KL (`DISTANCES` in registry.py).

    l2(s, t)   = 1/(2C) sum_c ((s_c - mean s) - (t_c - mean t))^2     mean over the batch
    dist(s, t) = T^2 (1/B sum_i (1 - rho(q_i, p_i)) + 1/C sum_c (1 - rho(q_:c, p_:c)))
                 q = softmax(s / T), p = softmax(t / T), rho(a, b) = a'b' / (|a'| |b'| + 1e-8),
                 a' and b' minus their means

`l2` is the limit of T^2 KL for large T (Hinton et al. 2015, section 2.1). It centres the logits of
each image, since a constant changes no prediction and stores keep logits up to a constant.
`dist` is DIST (Huang et al. 2022, beta = gamma = 1): the relation between classes of each image,
and the relation between images within each class. The latter is over the images of one call: a
micro-batch of one process.

Every function takes student and teacher [B, C] in any float dtype, `keep` [B] or None, and T. It
returns a scalar in float32 (float64 for float64); only the student gets a gradient. A sample of
`keep` 0 counts as 0 and the mean is over B. Within classes, means and correlations are then over
the kept images, and that half is times the share kept. Nothing is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8


def l2(student: Tensor, teacher: Tensor, keep: Tensor | None, temperature: float) -> Tensor:
    """Squared L2 distance of centred logits, mean over the batch; `temperature` is unused."""
    s, t = _inputs(student, teacher, keep)
    difference = (s - s.mean(dim=1, keepdim=True)) - (t - t.mean(dim=1, keepdim=True))
    losses = difference.square().mean(dim=1) / 2
    return (losses if keep is None else losses * keep).sum() / len(losses)


def dist(student: Tensor, teacher: Tensor, keep: Tensor | None, temperature: float) -> Tensor:
    """DIST: one minus Pearson's correlation, between classes and within classes, times T^2."""
    s, t = _inputs(student, teacher, keep)
    q, p = (s / temperature).softmax(dim=1), (t / temperature).softmax(dim=1)
    weight = torch.ones_like(q[:, 0]) if keep is None else keep.to(q.dtype)  # [B]
    share = weight.sum() / len(weight)

    between = (_one_minus_correlation(q, p) * weight).sum() / len(weight)

    # Weighted by the square root on both sides, a product of two columns is weighted once.
    root = weight.sqrt()[:, None]
    total = weight.sum().clamp(min=1.0)
    columns = [
        (root * (x - (weight[:, None] * x).sum(dim=0) / total)).transpose(0, 1) for x in (q, p)
    ]
    within = _one_minus_cosine(*columns).mean() * share
    return temperature**2 * (between + within)


def _inputs(student: Tensor, teacher: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both in float32 or more, with zeros for rejected samples, whose logits may be
    infinite.
    """
    s, t = (x.float() if x.element_size() < 4 else x for x in (student, teacher.detach()))
    if keep is None:
        return s, t
    counts = (keep != 0)[:, None]
    return s.where(counts, 0.0), t.where(counts, 0.0)


def _one_minus_correlation(a: Tensor, b: Tensor) -> Tensor:
    """1 - Pearson's correlation of the rows of [N, M] -> [N]."""
    return _one_minus_cosine(a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True))


def _one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    # The gradient of `vector_norm` is 0 where the norm is 0.
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return 1 - (a * b).sum(dim=1) / (lengths + EPS)
