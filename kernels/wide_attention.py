"""Attention of one head wider than flash kernels support (512 in a published VQGAN; they end at
256), for inference.

    y_i = sum_j softmax_j(scale q_i . k_j) v_j           q, k, v, y [B, N, D], one dtype

The table (tuning.json, "wide_attention") names an implementation for each architecture and width;
`python -m dad_fast.kernels.tuning wide_attention --write` measures it. It has not run on a GPU yet.
Until then the table has bmm, by arithmetic: its products run on tensor cores at the rate of large
GEMMs, and at 784 positions it moves 5 MB of scores an image, about 1.3 us on an H200.

sdpa      PyTorch's dispatcher. On CUDA, flash attention ends at width 256, cuDNN's at 256 or below.
          The memory-efficient kernel has no limit, but is not tuned for this width: above 128 it
          keeps its float32 sums in global memory. It requires a last dimension of stride 1; without
          it, three float32 operations run.
bmm       batched GEMMs around a softmax; the scores [B, N, N] are rounded to the dtype, which costs
          up to twice the error. Reads any strides without a copy.
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


def tokens(x: Tensor) -> Tensor:
    """View a map [B, C, H, W] as tokens [B, H W, C]; they are dense if the map is NHWC."""
    return x.flatten(2).transpose(1, 2)


def sdpa_as_given(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (tensor.unsqueeze(1) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return sdpa_as_given(q.contiguous(), k.contiguous(), v.contiguous(), scale)


def bmm(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)  # [B, N, N]
    return torch.bmm(scores.softmax(dim=2), v)


def xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    q, k, v = (tensor.contiguous().unsqueeze(2) for tensor in (q, k, v))  # [B, N, heads, D]
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
    """Return the maps of f8 at 224 px, 32 images, in float16, in NHWC as the VQGAN has them."""
    maps = torch.randn(2, 32, 28, 28, 512, dtype=torch.float16, device="cuda")
    q, h = map(tokens, maps.permute(0, 1, 4, 2, 3))
    ways = [
        way for way in WAYS if way != "xformers" or importlib.util.find_spec("xformers") is not None
    ]

    def run(meta: dict[str, Any]) -> Tensor:
        return WAYS[meta["way"]](q, h, h, 512**-0.5)

    (entry,) = entries("wide_attention", architecture("cuda"))
    return [
        TuningCase("wide_attention", entry["max"], cast(Any, [{"way": way} for way in ways]), run)
    ]
