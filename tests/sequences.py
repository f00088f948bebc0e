"""What every source owes a training run: one sequence of batches, whoever reads it."""

from __future__ import annotations

import torch

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.loaders.loader import Batch, TrainLoader
from dad_fast.data.sources.base import Source


def check_sequence(source: Source, augment: AugmentConfig) -> list[Batch]:
    """Check that four batches of eight are the same for two ranks and for a run that begins at the
    third step. Return them.
    """
    whole = list(TrainLoader(source, augment, 16, 8, 3, 0).batches(0, 4))
    later = list(TrainLoader(source, augment, 16, 8, 3, 0).batches(2, 4))
    halves = [
        list(TrainLoader(source, augment, 16, 4, 3, 0, rank=rank, world=2).batches(0, 4))
        for rank in range(2)
    ]
    for name in ("images", "labels", "samples", "seeds", "mix_lam"):
        for step, batch in enumerate(whole):
            expected = getattr(batch, name)
            both = torch.cat([getattr(half[step], name) for half in halves])
            assert torch.equal(expected, both), name
            if step >= 2:
                assert torch.equal(expected, getattr(later[step - 2], name)), name
    return whole
