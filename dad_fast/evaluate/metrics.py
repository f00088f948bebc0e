"""Top-1, top-5, expected calibration error and negative log-likelihood, summed on the device and read once.

ECE = sum over bins of |bin| / N * |accuracy(bin) - confidence(bin)|, bins ((m-1)/15, m/15] of the largest softmax output
      (Guo et al. 2017, arXiv 1706.04599)
NLL = mean of -log softmax(logits)[label], in nats
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 15
_HEAD = 4  # images, top-1 hits, top-5 hits, NLL; then hits, confidence and images of each bin


def batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """What the metrics need of a batch: float64 [4 + 3 * 15] on its device. Sums of batches, and of processes, add up.

    logits: float [B, C]; labels: int64 [B] in 0 … C-1. Equal logits rank by class number. A row that is not finite counts as
    wrong, with confidence 0, and makes the NLL not a number.
    """
    logits = logits.double()
    classes = torch.arange(logits.shape[1], device=logits.device)
    own = logits.gather(1, labels[:, None])  # [B, 1]
    rank = ((logits > own) | ((logits == own) & (classes < labels[:, None]))).sum(dim=1)
    finite = logits.isfinite().all(dim=1)
    top1, top5 = ((rank < k) & finite for k in (1, 5))
    log_probabilities = logits.log_softmax(dim=1)
    nll = -log_probabilities.gather(1, labels[:, None]).sum()
    confidence = log_probabilities.amax(dim=1).exp().where(finite, 0.0)
    bins = ((confidence * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)
    member = torch.nn.functional.one_hot(bins, NUM_BINS).double()  # [B, 15]; a sum over it is deterministic, index_add is not
    per_bin = torch.stack((top1.double(), confidence, torch.ones_like(confidence))) @ member  # [3, 15]
    head = torch.stack((per_bin[2].sum(), top1.sum().double(), top5.sum().double(), nll))
    return torch.cat((head, per_bin.flatten()))


def finish(sums: Tensor, num_classes: int) -> dict[str, float | int | None]:
    """The metrics of summed `batch_sums`; the one read from the device.

    Returns num_images; top1, top5 and ece in percent; nll in nats. top5 is None with fewer than 6 classes, where it says nothing.
    Raises ValueError where no image was counted.
    """
    values = sums.tolist()
    num_images, top1, top5, nll = values[:_HEAD]
    if not num_images:
        raise ValueError("no image was counted")
    hits, confidence = (values[_HEAD + i * NUM_BINS : _HEAD + (i + 1) * NUM_BINS] for i in range(2))
    return {
        "num_images": round(num_images),
        "top1": 100 * top1 / num_images,
        "top5": 100 * top5 / num_images if num_classes > 5 else None,
        "ece": 100 * sum(abs(h - c) for h, c in zip(hits, confidence, strict=True)) / num_images,
        "nll": nll / num_images,
    }
