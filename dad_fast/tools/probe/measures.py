"""Measures of a linear probe besides accuracy: latent organisation, epistemic uncertainty, and
learning from few labels.

silhouette   mean over samples of (b - a) / max(a, b): a = mean distance to the own class, b = the
             least mean distance to another class (Rousseeuw 1987); 0 for the only sample of a class
class means  predict the class whose mean of training features is nearest
uncertainty  of M probes p_m: H(mean p_m) = mean H(p_m) + mutual information between the output and
             the choice of the probe; the first term of the sum is aleatoric, the second epistemic
             (Houlsby et al., arXiv 1112.5745)
few labels   argmin over W, b of mean CE(W f + b, y) + strength / 2 ||W - W0||^2: logistic
             regression initialised at the probe W0
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # rows of distances at a time


class Uncertainty(NamedTuple):
    """Uncertainty of each sample in nats, float64 [N]: total = aleatoric + epistemic."""

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def silhouette(features: Tensor, labels: Tensor) -> float:
    """Mean silhouette of features [N, F] (Euclidean) under labels int64 [N], from -1 to 1.

    Raises ValueError with fewer than two classes.
    """
    classes, own = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("a silhouette needs two classes")
    features = features.double()
    member = F.one_hot(own).double()  # [N, C]
    counts = member.sum(dim=0)
    total = 0.0
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        # Differences, not the expanded square, so that the distance of a sample to itself is 0.
        # [n, C].
        sums = (
            torch.cdist(features[rows], features, compute_mode="donot_use_mm_for_euclid_dist")
            @ member
        )
        mine = own[rows, None]
        size = counts[mine].squeeze(1)
        a = sums.gather(1, mine).squeeze(1) / (size - 1)
        b = (sums / counts).scatter(1, mine, torch.inf).amin(dim=1)
        scores = ((b - a) / torch.maximum(a, b)).nan_to_num(0.0)  # 0 / 0: all samples are one point
        total += scores.where(size > 1, 0.0).sum().item()
    return total / len(features)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the mean features of each class, float64 [C, F]; NaN for a class without samples,
    which is never the nearest.
    """
    member = F.one_hot(labels, num_classes).double()
    return (member.T @ features.double()) / member.sum(dim=0)[:, None]


def nearest_mean(features: Tensor, means: Tensor) -> Tensor:
    """Return the class int64 [N] whose mean [C, F] is nearest to each of features [N, F]; the
    lowest one in a tie.
    """
    distances = torch.cdist(features.double(), means, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.nan_to_num(torch.inf).argmin(dim=1)


def uncertainty(log_probabilities: Tensor) -> Uncertainty:
    """Split the uncertainty of an ensemble with log-probabilities [M, N, C]."""
    log_p = log_probabilities.double()
    mean = log_p.logsumexp(dim=0) - math.log(len(log_p))
    total = torch.special.entr(mean.exp()).sum(dim=1)
    aleatoric = torch.special.entr(log_p.exp()).sum(dim=2).mean(dim=0)
    # Rounding can leave the difference just below 0.
    return Uncertainty(total, aleatoric, (total - aleatoric).clamp(min=0.0))


@torch.enable_grad()
def few_labels(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """Fit a linear layer, initialised at the given one, to features [N, F] with labels int64 [N];
    float64 weight [C, F], bias [C].

    The penalty is on the distance of the weight from its start, not on the bias; with a start of
    zeros this is L2-regularised logistic regression. The problem is convex, so the result does not
    depend on the optimizer (L-BFGS).
    """
    features, start = features.double(), weight.detach().double()
    weight, bias = start.clone().requires_grad_(), bias.detach().double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(F.linear(features, weight, bias), labels)
            + strength / 2 * (weight - start).square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
