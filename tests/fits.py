"""A fit of `dad-fast fit-discretizer` that is stopped."""

from __future__ import annotations

import pytest

from dad_fast.distributed import signals
from dad_fast.errors import Preempted
from dad_fast.tools.fit_discretizer.fit import Fit


def stop_in_second_step(patch: pytest.MonkeyPatch) -> None:
    """Let fits get SIGTERM's request in their second step."""
    step = Fit.step

    def counted(self: Fit, number: int, *rest: object) -> object:
        if number == 1 and signals._active is not None:
            signals._active.error = Preempted
        return step(self, number, *rest)

    patch.setattr(Fit, "step", counted)
