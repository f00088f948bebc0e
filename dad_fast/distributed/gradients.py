"""Gradients as views of one flat tensor, so that one collective sums them over the processes.

Own code rather than DistributedDataParallel: the all-reduce runs between two CUDA graphs, where
hooks of a backward pass cannot run, and the eager step does exactly what the graphs do. DDP
overlaps the all-reduce with the backward pass, which saves little where most of a step is forward
work of the teacher and the VQGAN (docs/distributed.md has the numbers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dad_fast.distributed import process_group as distributed
from dad_fast.errors import DadFastError

# In elements: every gradient starts at an address that allows vector loads.
ALIGN = 64


class SharedGradients:
    """Flat storage for gradients, created after the first backward pass, which shows the used ones.

    Args:
        parameters: all of the student's, of one dtype and device.
        averaged: further tensors that `reduce` averages over the processes, such as batch norm's
            running statistics.

    Raises DadFastError where the processes have gradients of different parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], averaged: Sequence[Tensor]) -> None:
        used = [p for p in parameters if p.grad is not None]
        self._unused = [p for p in parameters if p.grad is None]
        self._averaged = list(averaged)
        shapes = [list(p.shape) for p in used]
        if any(other != shapes for other in distributed.all_gather_json(shapes)):
            raise DadFastError(
                "the processes have gradients of different parameters: "
                "the student must use the same parameters in all of them"
            )
        starts = []
        size = 0
        for tensor in (*used, *self._averaged):
            starts.append(size)
            size += -(-tensor.numel() // ALIGN) * ALIGN
        self.flat = torch.zeros(size, dtype=used[0].dtype, device=used[0].device)
        for p, start in zip(used, starts, strict=False):
            # The layout of the parameter, channels_last included.
            view = self.flat[start:].as_strided(p.shape, p.stride())
            assert p.grad is not None
            view.copy_(p.grad)
            p.grad = view
        tail = zip(self._averaged, starts[len(used) :], strict=True)
        self._slots = [
            self.flat[start : start + tensor.numel()].view(tensor.shape) for tensor, start in tail
        ]

    def reduce(self) -> None:
        """Sum the gradients and average `averaged` over the processes. Does not wait for a GPU."""
        if any(p.grad is not None for p in self._unused):
            raise DadFastError(
                "a parameter of the student got its first gradient after the first step; "
                "with several processes every parameter must be used in the first step"
            )
        torch._foreach_copy_(self._slots, self._averaged)
        distributed.all_reduce_sums(self.flat)
        torch._foreach_mul_(self._slots, 1.0 / distributed.world())
        torch._foreach_copy_(self._averaged, self._slots)


def running_statistics(student: nn.Module) -> list[Tensor]:
    """Return the running means and variances of batch norm layers in training mode.

    Each process sees a part of the batch, and all keep the mean of their statistics. Layers in eval
    mode have none to average, so that the encoder of a linear probe stays bit-identical.
    """
    found = []
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            found += [b for b in (module.running_mean, module.running_var) if b is not None]
    return found
