"""Gradient checkpointing of timm's models, with batch norm that counts a batch once.

The backward pass runs the forward pass of a checkpointed block again, and torch's batch norm would
update its running statistics there a second time. fairscale's `checkpoint_wrapper` has the same fix
for reentrant checkpoints, which timm no longer uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dad_fast.errors import UsageError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Attribute of a batch norm that holds its statistics while copies stand in for them.
HELD = "_statistics_of_first_pass"


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Turn on timm's gradient checkpointing. Raises UsageError for a model without it."""
    timms: Any = model
    try:
        timms.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        raise UsageError(
            f"--student {name}: timm cannot checkpoint its gradients; leave --grad-checkpointing out"
        ) from None
    keep_statistics(model)


def keep_statistics(model: nn.Module) -> None:
    """Let no batch norm of `model` update its running statistics in a recomputed forward pass."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not _keeps_statistics(module):
            module.register_forward_pre_hook(_hold)
            # A recomputation stops with an exception once it has all that the backward pass needs.
            module.register_forward_hook(_release, always_call=True)


def is_checkpointed(model: nn.Module) -> bool:
    """Return whether `checkpoint_gradients` found batch norms in `model`."""
    return any(map(_keeps_statistics, model.modules()))


def _keeps_statistics(module: nn.Module) -> bool:
    return _hold in module._forward_pre_hooks.values()


def _hold(module: nn.Module, args: Any) -> None:
    # Compiled code is no recomputation by torch.utils.checkpoint: it updates buffers once.
    if torch.compiler.is_compiling():
        return
    # -1 outside of a backward pass, as torch.utils.checkpoint itself tests it.
    if torch._C._current_graph_task_id() == -1:
        return
    held = {name: module._buffers[name] for name in STATISTICS}
    # Copies instead of None, with which batch norm would save other tensors than in the first pass.
    module._buffers.update({name: None if b is None else b.clone() for name, b in held.items()})
    object.__setattr__(module, HELD, held)


def _release(module: nn.Module, args: Any, output: Any) -> None:
    held = module.__dict__.pop(HELD, None)
    if held is not None:
        module._buffers.update(held)
