"""Discretizers by name. To add one: a file with a factory, and a line here.

A factory is called with the argument after the name's colon and a `LoadContext`, and returns a
`Discretizer`.
"""

from __future__ import annotations

import re
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
DISCRETIZERS.add("jpeg", "dad_fast.discretizers.codec:load_jpeg")
DISCRETIZERS.add("webp", "dad_fast.discretizers.codec:load_webp")
DISCRETIZERS.add("blur", "dad_fast.discretizers.blur:load")

# Discretizers without codes or weights, the controls of an experiment
CONTROLS = ("identity", "jpeg:75", "webp:75", "blur:4")
# Largest argument, and its wording
_ARGUMENTS = {
    "jpeg": (100, "jpeg:QUALITY with a quality from 1 to 100, such as jpeg:75"),
    "webp": (100, "webp:QUALITY with a quality from 1 to 100, such as webp:75"),
    "blur": (64, "blur:FACTOR with a factor above 1 and up to 64, such as blur:4"),
}

# L2 budgets of attacks that a discretizer shows: of photographs at 224 px, noise of 0.1 changes no
# pixel value after jpeg:75, and of 0.4 a quarter of them. The controls share one budget, so that
# they can be compared. Others take the paper's, for a VQGAN.
PAPER_BUDGET = 0.1
BUDGETS = {"identity": 0.4, "jpeg": 0.4, "webp": 0.4, "blur": 0.4}


def check_argument(name: str, argument: str, text: str) -> None:
    """Raise UsageError if the argument of a built-in discretizer is not such a number.

    text: the whole of --discretizer. Needs no torch, so that settings can be checked at once.
    """
    if name not in _ARGUMENTS:
        return
    most, wording = _ARGUMENTS[name]
    if name == "blur":
        is_number = re.fullmatch(r"\d{1,3}(\.\d{1,3})?", argument, re.ASCII)
        is_valid = is_number is not None and 1 < float(argument) <= most
    else:
        is_valid = re.fullmatch(r"\d{1,3}", argument, re.ASCII) is not None
        is_valid = is_valid and 1 <= int(argument) <= most
    if not is_valid:
        raise UsageError(f"--discretizer {text}: write {wording}")


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
    """Load FILE (.ckpt, .pt or .safetensors of a VQGAN), a diffusers folder, or a discretizer of the
    registry, such as `jpeg:75`.

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
    if not name or (not Path(name).suffix and not Path(name).exists()):
        raise UsageError(
            f"--discretizer {name!r}: no such file; write a .ckpt or .safetensors, a folder of a "
            f"diffusers VQModel, or one of {', '.join(DISCRETIZERS.names())} (embedded:digits, "
            "jpeg:75)"
        )
    return load_file("", context)
