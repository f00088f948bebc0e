"""The gradients of several processes as one: views of a single flat tensor, so that one collective sums them without a copy.

Why not DistributedDataParallel: the all-reduce has its place between two CUDA graphs (graph.py), where no hook of a backward pass can run,
and the plain form of the step is to do exactly what the graphs do. What DDP adds, overlap with the backward pass, is worth little where
most of a step is the teacher's and the VQGAN's forward work (docs/distributed.md has the arithmetic). What is left of it is this file:
no wrapper around the student, no `no_sync` for accumulation, the same names in every state dict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dad_fast.distributed import process_group as distributed
from dad_fast.errors import DadFastError

ALIGN = 64  # elements: every gradient begins where vector loads may


class SharedGradients:
    """Made after the first backward pass, when it is known which parameters have a gradient; from then on these stay where they are.

    Args:
        parameters: all of the student's, of one dtype and device.
        averaged: further tensors of which `reduce` makes means over the processes, such as batch norm's running statistics.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], averaged: Sequence[Tensor]) -> None:
        used = [p for p in parameters if p.grad is not None]
        self._unused = [p for p in parameters if p.grad is None]
        self._averaged = list(averaged)
        shapes = [list(p.shape) for p in used]
        if any(other != shapes for other in distributed.all_gather_json(shapes)):
            raise DadFastError(
                "the processes have gradients of different parameters: the student must do the same work in all of them"
            )
        starts, size = [], 0
        for tensor in (*used, *self._averaged):
            starts.append(size)
            size += -(-tensor.numel() // ALIGN) * ALIGN
        self.flat = torch.zeros(size, dtype=used[0].dtype, device=used[0].device)
        for p, start in zip(used, starts, strict=False):
            view = self.flat[start:].as_strided(
                p.shape, p.stride()
            )  # laid out as the parameter is, channels_last included
            assert p.grad is not None
            view.copy_(p.grad)
            p.grad = view
        tail = zip(self._averaged, starts[len(used) :], strict=True)
        self._slots = [
            self.flat[start : start + tensor.numel()].view(tensor.shape) for tensor, start in tail
        ]

    def reduce(self) -> None:
        """Sum the gradients over the processes, and average what is averaged. The host does not wait for a GPU."""
        if any(p.grad is not None for p in self._unused):
            raise DadFastError(
                "a parameter of the student got its first gradient after the first step; with several processes it may not"
            )
        torch._foreach_copy_(self._slots, self._averaged)
        distributed.all_reduce_sums(self.flat)
        torch._foreach_mul_(self._slots, 1.0 / distributed.world())
        torch._foreach_copy_(self._averaged, self._slots)


def running_statistics(student: nn.Module) -> list[Tensor]:
    """Batch norm's running means and variances: every process has seen a part of the batch, and all keep the mean of what they saw.

    Not those of layers in eval mode, which see nothing: a linear probe's encoder stays bit for bit as it is.
    """
    found = []
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            found += [b for b in (module.running_mean, module.running_var) if b is not None]
    return found
