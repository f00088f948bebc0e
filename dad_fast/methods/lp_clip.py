"""LP-CLIP's objective (arXiv 2309.10361): a linear probe learns its teacher's predictions, without
labels.

    y', c = argmax, max of softmax(teacher(weak view))
    loss  = 1/B sum_i w_i CE(probe(strong view_i), y'_i),   w_i = c_i or 1, and 0 where c_i < threshold

The mean is over the batch size: a threshold that few samples pass weakens the loss instead of
amplifying those few. The paper's settings are not public; its abstract describes confidence weights
and no threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.kernels.distillation_loss import smooth, soft_cross_entropy


def pseudo_labels(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels int64 [B] (the lowest class of equal ones) and confidences float32 [B] of
    logits [B, C].
    """
    probabilities = logits.float().softmax(dim=1)
    return probabilities.argmax(dim=1), probabilities.amax(dim=1)


def sample_weights(confidence: Tensor, weight: str, threshold: float) -> Tensor:
    """Return sample weights [B]: the confidence or 1 (`weight`: "confidence" or "none"), and 0
    below the threshold.
    """
    weights = confidence if weight == "confidence" else torch.ones_like(confidence)
    # `~(<)` and not `>=` keeps a NaN confidence, so that the step is skipped.
    return weights.where(~(confidence < threshold), 0.0)


def consistency_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Return the weighted cross-entropy of logits [B, C] to labels int64 [B], weights [B]; mean
    over the batch size.
    """
    if not smoothing:
        return soft_cross_entropy(logits, labels, weights)
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[1]).float()
    return soft_cross_entropy(logits, smooth(one_hot, smoothing), weights)
