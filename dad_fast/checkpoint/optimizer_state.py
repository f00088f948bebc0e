"""Convert an optimizer's state to named tensors and JSON, and back: checkpoints contain no
pickle.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

PREFIX = "optimizer."
# Implementation choices of an optimizer, made anew for the device on which a run resumes.
OF_THE_DEVICE = frozenset({"fused", "foreach", "capturable"})


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors, not copied, and JSON with their places.

    Raises TypeError for a state that is neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()
    groups = [
        {k: v.item() if torch.is_tensor(v) else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, _packed({**state, "param_groups": groups}, "", tensors)


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    saved: dict[str, Any],
    own: Collection[str] = (),
) -> None:
    """Restore the state of `flatten_optimizer` into an optimizer over the same parameters.

    own: settings of a parameter group, such as weight_decay, that keep the optimizer's present
    values.
    """
    state = _unpacked(saved, tensors)
    for group, built in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group.update({name: built[name] for name in {*own, *OF_THE_DEVICE} if name in built})
    optimizer.load_state_dict(state)
    for parameter, entry in optimizer.state.items():
        # Files contain contiguous tensors. Fused kernels walk memory linearly: moments need the
        # layout of their weights.
        for name, value in entry.items():
            if torch.is_tensor(value):
                entry[name] = _laid_out(value, parameter)


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a moment with the strides of `parameter` (channels_last); a value of another shape
    unchanged.
    """
    if value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON that keeps numeric keys and tuples, and add its tensors to
    `tensors`.
    """
    if torch.is_tensor(value):
        tensors[PREFIX + name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        names = {key: f"{name}.{key}".lstrip(".") for key in value}
        return {"dict": [[key, _packed(value[key], names[key], tensors)] for key in value]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold the optimizer's {name}, a {type(value).__name__}")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value that `_packed` converted."""
    if not isinstance(value, dict):
        return value
    ((kind, found),) = value.items()
    if kind == "tensor":
        return tensors[PREFIX + found]
    if kind == "dict":
        return {key: _unpacked(item, tensors) for key, item in found}
    if kind == "dtype":
        return getattr(torch, found)
    items = [_unpacked(item, tensors) for item in found]
    return items if kind == "list" else tuple(items)
