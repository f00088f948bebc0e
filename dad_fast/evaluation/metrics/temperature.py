"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599): one number that divides all logits."""

from __future__ import annotations

import numpy as np

# Range that is searched.
LOWEST, HIGHEST = 1e-2, 1e2


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature T that minimizes the mean NLL of softmax(logits / T).

    The NLL is convex in 1 / T, and its slope is the difference of two means:
    mean of sum over classes of p z, minus mean of z(label), for logits z.

    logits: float [N, C], finite. labels: int [N]. Raises ValueError where the NLL has no minimum in
    LOWEST … HIGHEST: every label has the largest logit, or the logits carry no information.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    own = z[np.arange(len(z)), labels].mean()

    def slope(inverse: float) -> float:
        return float((softmax(inverse * z, axis=1) * z).sum(axis=1).mean() - own)

    low, high = 1 / HIGHEST, 1 / LOWEST
    if slope(low) >= 0:
        raise ValueError("the logits are no better than chance, so no temperature fits")
    if slope(high) <= 0:
        raise ValueError(
            "the model is right on every image, so its NLL falls with any lower temperature"
        )
    inverse: float = brentq(slope, low, high, xtol=1e-12, rtol=1e-12)
    return 1 / inverse


def mean_nll(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood in nats, in float64."""
    from scipy.special import log_softmax

    log_p = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float(-log_p[np.arange(len(labels)), labels].mean())
