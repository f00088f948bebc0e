"""No discretizer: the ablation that keeps the attack's noise."""

from __future__ import annotations

from torch import Tensor

from dad_fast.discretizers.base import Discretized, Discretizer, LoadContext


class Identity(Discretizer):
    """Discretizer that returns its input."""

    name = "identity"
    provenance = "nothing: it changes nothing"

    def __call__(self, pixels: Tensor) -> Discretized:
        return Discretized(pixels.detach(), None)


def load(argument: str, context: LoadContext) -> Identity:
    """Load `identity`."""
    return Identity()
