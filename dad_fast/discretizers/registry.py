"""Discretizers by name. To add one: a file with a factory, and a line here.

A factory is called with the argument after the name's colon and a `LoadContext`, and returns a
`Discretizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dad_fast.errors import UsageError
from dad_fast.registry import Registry

if TYPE_CHECKING:
    import torch

    from dad_fast.config.schema import PrecisionConfig
    from dad_fast.discretizers.base import Discretizer, LoadContext

Factory = Callable[[str, "LoadContext"], "Discretizer"]
DISCRETIZERS: Registry[Factory] = Registry("discretizer", "dad_fast.discretizers", "--discretizer")
DISCRETIZERS.add("embedded", "dad_fast.discretizers.vqgan.discretizer:load_embedded")
DISCRETIZERS.add("identity", "dad_fast.discretizers.identity:load")
DISCRETIZERS.add("jpeg", "dad_fast.discretizers.jpeg:load")
# L2 budgets of attacks that a discretizer shows: of photographs at 224 px, noise of 0.1 changes no
# pixel value after jpeg:75, and of 0.4 a quarter of them. Others take the paper's, for a VQGAN.
PAPER_BUDGET = 0.1
BUDGETS = {"jpeg": 0.4, "identity": 0.4}


def visible_budget(name: str) -> float:
    """Return the L2 budget of `--attack-eps auto` for the discretizer `name`."""
    return BUDGETS.get(DISCRETIZERS.split(name)[0], PAPER_BUDGET)


def load_discretizer(
    name: str,
    precision: PrecisionConfig,
    device: torch.device,
    optimizations: object | None = None,
    shapes_only: bool = False,
    micro_batch: int = 0,
) -> Discretizer:
    """Load FILE (.ckpt or .safetensors of a VQGAN) or a discretizer of the registry, such as
    `jpeg:75`.

    optimizations: those of a VQGAN under autocast (VQGANOptimizations); all by default.
    micro_batch: images that a VQGAN takes at once; 0 = by their size.
    shapes_only: build the architecture; a VQGAN's file that does not exist is assumed to be
    "OpenImages f8, 16384".

    Raises UsageError for a name that is none of these, DataError for a file that cannot be used.
    """
    from dad_fast.discretizers.base import LoadContext
    from dad_fast.discretizers.vqgan.discretizer import DEFAULT_OPTIMIZATIONS, load_file

    wanted = optimizations or DEFAULT_OPTIMIZATIONS
    context = LoadContext(
        text=name,
        precision=precision,
        device=device,
        optimizations=wanted,
        shapes_only=shapes_only,
        micro_batch=micro_batch,
    )
    key, argument = DISCRETIZERS.split(name)
    if key in DISCRETIZERS:
        return DISCRETIZERS[key](argument, context)
    if not Path(name).suffix and not Path(name).is_file():
        raise UsageError(
            f"--discretizer {name!r}: no such file; write a .ckpt or .safetensors, or one of "
            f"{', '.join(DISCRETIZERS.names())} (embedded:digits, jpeg:75)"
        )
    return load_file("", context)
