"""What a linear probe's features and outputs tell beside its accuracy: latent organisation, epistemic uncertainty, and few labels.

silhouette   mean over samples of (b - a) / max(a, b): a = mean distance to the own class, b = the least mean distance to another
             class (Rousseeuw 1987); 0 for a sample that is alone in its class
class means  a sample is of the class whose mean of training features is nearest
uncertainty  of M probes p_m: H(mean p_m) = mean H(p_m) + mutual information between the output and the choice of the probe; the first
             term of the sum is aleatoric, the second epistemic (Houlsby et al., arXiv 1112.5745)
few labels   argmin over W, b of mean CE(W f + b, y) + strength / 2 ||W - W0||^2: logistic regression that begins at the probe W0
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # rows of distances at a time


class Uncertainty(NamedTuple):
    """In nats, float64 [N]: total = aleatoric + epistemic."""

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def silhouette(features: Tensor, labels: Tensor) -> float:
    """Mean silhouette of features [N, F] (Euclidean) under labels int64 [N], from -1 to 1. ValueError with fewer than two classes."""
    classes, own = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("a silhouette needs two classes")
    features = features.double()
    member = F.one_hot(own).double()  # [N, C]
    counts = member.sum(dim=0)
    total = 0.0
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        # Differences, not the expanded square: the distance of a sample to itself is 0.
        sums = (
            torch.cdist(features[rows], features, compute_mode="donot_use_mm_for_euclid_dist")
            @ member
        )  # [n, C]
        mine = own[rows, None]
        size = counts[mine].squeeze(1)
        a = sums.gather(1, mine).squeeze(1) / (size - 1)
        b = (sums / counts).scatter(1, mine, torch.inf).amin(dim=1)
        scores = ((b - a) / torch.maximum(a, b)).nan_to_num(0.0)  # 0 / 0: all samples are one point
        total += scores.where(size > 1, 0.0).sum().item()
    return total / len(features)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Float64 [C, F]; not a number for a class without samples, which then is nearest to nothing."""
    member = F.one_hot(labels, num_classes).double()
    return (member.T @ features.double()) / member.sum(dim=0)[:, None]


def nearest_mean(features: Tensor, means: Tensor) -> Tensor:
    """The class int64 [N] whose mean [C, F] is nearest to each of features [N, F]; the lowest of equal ones."""
    distances = torch.cdist(features.double(), means, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.nan_to_num(torch.inf).argmin(dim=1)


def uncertainty(log_probabilities: Tensor) -> Uncertainty:
    """Of an ensemble's log-probabilities [M, N, C]."""
    log_p = log_probabilities.double()
    mean = log_p.logsumexp(dim=0) - math.log(len(log_p))
    total = torch.special.entr(mean.exp()).sum(dim=1)
    aleatoric = torch.special.entr(log_p.exp()).sum(dim=2).mean(dim=0)
    return Uncertainty(
        total, aleatoric, (total - aleatoric).clamp(min=0.0)
    )  # rounding can leave it just below 0


@torch.enable_grad()
def few_labels(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """The linear layer, float64 weight [C, F] and bias [C], that begins at the given one and learns features [N, F], labels int64 [N].

    The penalty is on the weight's way from its start, not on the bias; with a start of zeros this is L2-regularised logistic
    regression. The problem is convex, so that the answer does not depend on the optimizer (L-BFGS).
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
