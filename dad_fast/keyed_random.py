"""Random numbers keyed by their purpose, so that any draw can be repeated alone.

Philox-4x64 is a function of (key, counter). The key is the run's seed, the counter is (block,
stream, index, epoch): no two purposes share numbers and nothing is hashed. Only raw bits come from
numpy, which guarantees them across versions; it does not guarantee its distributions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Streams.
ORDER, RECORD, MIX, ERASE, SEED, PICTURE = range(6)
_MASK = (1 << 64) - 1
_UNIT = 2.0**-53


def _bits(seed: int, stream: int, epoch: int, index: int) -> np.random.Philox:
    key = np.array([seed & _MASK, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, stream, index, epoch], dtype=np.uint64))


def raw_bits(seed: int, stream: int, epoch: int, index: int, num: int) -> np.ndarray:
    """Return the first `num` raw words, uint64 [num]."""
    return _bits(seed, stream, epoch, index).random_raw(num)


class Draws:
    """Sequence of numbers for one purpose. Nothing is computed before the first draw."""

    __slots__ = ("_key", "_source", "_waiting")

    def __init__(self, seed: int, stream: int, epoch: int, index: int) -> None:
        self._key = (seed, stream, epoch, index)
        self._source: np.random.Philox | None = None
        self._waiting: list[int] = []

    def uniform(self) -> float:
        """Draw from [0, 1)."""
        if not self._waiting:
            if self._source is None:
                self._source = _bits(*self._key)
            self._waiting = self._source.random_raw(16).tolist()
            self._waiting.reverse()
        return (self._waiting.pop() >> 11) * _UNIT

    def between(self, low: float, high: float) -> float:
        """Draw from [low, high)."""
        return low + (high - low) * self.uniform()

    def below(self, num: int) -> int:
        """Draw an integer from 0 … num-1."""
        return int(self.uniform() * num)

    def chance(self, probability: float) -> bool:
        """Return True with this probability; 0 and 1 use no draw."""
        return probability > 0 and (probability >= 1 or self.uniform() < probability)

    def signed(self, value: float) -> float:
        """Return `value` or its negative with equal probability."""
        return -value if self.uniform() < 0.5 else value

    def normal(self) -> float:
        """Draw from the standard normal (Box-Muller, one of the pair)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        return radius * math.cos(2.0 * math.pi * self.uniform())

    def pick(self, weights: Sequence[float]) -> int:
        """Draw an index with probability proportional to its weight."""
        target = self.uniform() * sum(weights)
        for index, weight in enumerate(weights):
            target -= weight
            if target < 0:
                return index
        # Rounding at the very end of the range.
        return max(i for i, weight in enumerate(weights) if weight > 0)

    def beta(self, alpha: float) -> float:
        """Draw from Beta(alpha, alpha), in [0, 1].

        Computed in logs, since gamma variates of a small alpha underflow.
        """
        difference = self._log_gamma(alpha) - self._log_gamma(alpha)
        if difference < 0:
            return math.exp(difference) / (1.0 + math.exp(difference))
        return 1.0 / (1.0 + math.exp(-difference))

    def dirichlet(self, alpha: float, num: int) -> tuple[float, ...]:
        """Draw `num` shares with sum 1 from the symmetric Dirichlet distribution."""
        logs = [self._log_gamma(alpha) for _ in range(num)]
        largest = max(logs)
        parts = [math.exp(log - largest) for log in logs]
        total = sum(parts)
        return tuple(part / total for part in parts)

    def _log_gamma(self, alpha: float) -> float:
        """Draw the log of a Gamma(alpha, 1) variate.

        Marsaglia and Tsang (2000) for alpha + 1, scaled by U^(1/alpha).
        """
        d = alpha + 1.0 - 1.0 / 3.0
        c = 1.0 / math.sqrt(9.0 * d)
        while True:
            x = self.normal()
            v = (1.0 + c * x) ** 3
            if v > 0 and math.log(1.0 - self.uniform()) < 0.5 * x * x + d - d * v + d * math.log(v):
                return math.log(d * v) + math.log(1.0 - self.uniform()) / alpha


def sample_seeds(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """Return a non-negative seed per sample, keyed by (seed, epoch, sample), for device noise.

    A chain of splitmix64 finalizers over the whole batch. `samples` int64 [B] -> int64 [B].
    """
    with np.errstate(over="ignore"):
        words = np.full(samples.shape, seed & _MASK, dtype=np.uint64)
        for part in (np.uint64(SEED), np.uint64(epoch), samples.astype(np.uint64)):
            words = _splitmix((words ^ part) + np.uint64(0x9E3779B97F4A7C15))
    return (words >> np.uint64(1)).astype(np.int64)


def _splitmix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
