"""Attention of one head wider than flash kernels support (512 in a published VQGAN; they end at
256), for inference.

    y_i = sum_j softmax_j(scale q_i . k_j) v_j           q, k, v, y [B, N, D], one dtype

The fastest implementation depends on the GPU: the table (tuning.json, "wide_attention") has one for
each architecture and width, measured by `python -m dad_fast.kernels.tuning wide_attention --write`.
Not yet measured on a GPU, so the table has PyTorch's own choice.

sdpa      PyTorch's dispatcher; on CUDA at this width it has the memory-efficient kernel (16 and 32
          bits) or three plain operations
bmm       batched GEMMs around a softmax; the scores [B, N, N] are rounded to the dtype, which costs
          up to twice the error
xformers  memory_efficient_attention, where it is installed for this torch
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dad_fast.kernels.tuning import TuningCase, architecture, entries, meta_parameters

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (tensor.unsqueeze(1) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(1)


def bmm(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)  # [B, N, N]
    return torch.bmm(scores.softmax(dim=2), v)


def xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    q, k, v = (tensor.unsqueeze(2) for tensor in (q, k, v))  # [B, N, heads, D]
    return ops.memory_efficient_attention(q, k, v, scale=scale).squeeze(2)


WAYS: dict[str, Attend] = {"sdpa": sdpa, "bmm": bmm, "xformers": xformers}


def wide_attention(device: torch.device, width: int) -> Attend:
    """Return the table's implementation for heads of `width` on `device`; PyTorch's own without
    CUDA or xformers.
    """
    if device.type != "cuda":
        return sdpa
    way = cast(
        dict[str, Any], meta_parameters("wide_attention", architecture(device), width=width)
    )["way"]
    return sdpa if way == "xformers" and importlib.util.find_spec("xformers") is None else WAYS[way]


def tuning_cases() -> list[TuningCase]:
    """Return the maps of f8 at 224 px, 32 images, in float16."""
    q, h = torch.randn(2, 32, 784, 512, dtype=torch.float16, device="cuda")
    ways = [
        way for way in WAYS if way != "xformers" or importlib.util.find_spec("xformers") is not None
    ]

    def run(meta: dict[str, Any]) -> Tensor:
        return WAYS[meta["way"]](q, h, h, 512**-0.5)

    (entry,) = entries("wide_attention", architecture("cuda"))
    return [
        TuningCase("wide_attention", entry["max"], cast(Any, [{"way": way} for way in ways]), run)
    ]
