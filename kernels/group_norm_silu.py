"""`group_norm_silu` and `add_group_norm_silu`: group norm and SiLU of NHWC maps, with the preceding
bias and residual.

    t = x + channel_bias (+ residual)                      [B, C, H, W]; both optional in the first,
                                                           which does not return t
    m, v = mean and variance of t over H, W and the channels of a group; C / num_groups of them
    y = SiLU((t - m) / sqrt(v + eps) * weight + bias)      SiLU(u) = u / (1 + exp(-u)); left out if
                                                           silu is False

x, residual, y, t: float32, float16 or bfloat16, one dtype; weight, bias, channel_bias [C] of any of
these. All arithmetic is float32; t is rounded to x's dtype before its statistics are taken if it is
returned, else never rounded. For inference: no gradient.

Two passes over the map. Each program of the first sums its rows about their first one, so that a
mean far from 0 cancels before squares are taken; means and squared deviations are then merged
pairwise-exactly (Chan, Golub, LeVeque 1983). Deterministic. Bytes per 16-bit element: 6 (read,
read, write), and 10 where a residual is added (read 3, write 2); bias, add, norm and SiLU one by
one move 20.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class NormMap(NamedTuple):
    """Shape of one call of these functions, but for the batch size."""

    channels: int
    height: int
    width: int
    groups: int
    eps: float
    silu: bool
    dtype: torch.dtype
    has_bias: bool
    has_residual: bool


def nhwc_empty(x: Tensor) -> Tensor:
    """[B, C, H, W] as x, dense in NHWC."""
    batch, channels, height, width = x.shape
    return x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def reference(
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y of `total` = t, computed in `dtype` by torch's own functions."""
    y = F.group_norm(total.to(dtype), num_groups, weight.to(dtype), bias.to(dtype), eps)
    return F.silu(y) if silu else y


def torch_keeps_nhwc(device: torch.device) -> bool:
    """True if F.group_norm of an NHWC map on the device returns NHWC; on CUDA, new releases do."""
    x = torch.zeros(2, 4, 2, 2, device=device).to(memory_format=torch.channels_last)
    return F.group_norm(x, 2).is_contiguous(memory_format=torch.channels_last)


def nhwc_group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm of a map [B, C, H, W] that is dense in NHWC, in plain torch, which stays in NHWC.

    F.group_norm of some releases of torch copies such a map on CUDA to NCHW, and the next
    convolution copies it back: 14 bytes per 16-bit element. Here a map is read for its means, for
    its squares and for the result, and written once: 8. Statistics are per channel first, which
    torch reduces without a copy, in float32; x * factor + shift is computed in float32 and rounded
    once.
    """
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, HW, C], a view
    if x.dtype == torch.float32:
        variance, mean = torch.var_mean(rows, dim=1, correction=0)
    else:
        mean = rows.mean(dim=1, dtype=torch.float32)
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        variance = (norm.square() / (height * width) - mean.square()).clamp(min=0)
    mean, variance = (each.view(batch, num_groups, -1) for each in (mean, variance))  # [B, G, C/G]
    group_mean = mean.mean(dim=2, keepdim=True)
    group_variance = (variance + (mean - group_mean).square()).mean(dim=2, keepdim=True)
    factor = weight.float().view(num_groups, -1) * (group_variance + eps).rsqrt()  # [B, G, C/G]
    shift = bias.float().view(num_groups, -1) - group_mean * factor
    y = nhwc_empty(x)
    maps = (each.view(batch, channels, 1, 1) for each in (shift, factor))
    shift, factor = maps
    return torch.addcmul(shift, x, factor, out=y)


@torch.library.custom_op("dad_fast::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    channel_bias: Tensor | None,
) -> Tensor:
    total = (
        x.float() if channel_bias is None else x.float() + channel_bias.float().view(1, -1, 1, 1)
    )
    return nhwc_empty(x).copy_(reference(total, weight, bias, num_groups, eps, silu))


@_group_norm_silu.register_kernel("cuda")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    channel_bias: Tensor | None,
) -> Tensor:
    from dad_fast.kernels.group_norm_silu_triton import launch

    return launch(x, None, weight, bias, num_groups, eps, silu, channel_bias)[0]


@_group_norm_silu.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    channel_bias: Tensor | None,
) -> Tensor:
    return nhwc_empty(x)


@torch.library.custom_op("dad_fast::add_group_norm_silu", mutates_args=())
def _add_group_norm_silu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    channel_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = (
        x.float() if channel_bias is None else x.float() + channel_bias.float().view(1, -1, 1, 1)
    )
    total = nhwc_empty(x).copy_(total + residual)
    return nhwc_empty(x).copy_(reference(total, weight, bias, num_groups, eps, silu)), total


@_add_group_norm_silu.register_kernel("cuda")
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    channel_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from dad_fast.kernels.group_norm_silu_triton import launch

    return launch(x, residual, weight, bias, num_groups, eps, silu, channel_bias)


@_add_group_norm_silu.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    channel_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return nhwc_empty(x), nhwc_empty(x)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    channel_bias: Tensor | None = None,
) -> Tensor:
    """y (see the top of this file) [B, C, H, W] in NHWC, of `x` [B, C, H, W] in any layout; Triton
    on CUDA, torch elsewhere.

    weight, bias, channel_bias: [C]; num_groups divides C. Raises ValueError for shapes and dtypes
    that do not fit.
    """
    _check(x, None, weight, bias, num_groups, channel_bias)
    return _group_norm_silu(x, weight, bias, num_groups, eps, silu, channel_bias)


def add_group_norm_silu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    channel_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, t), both [B, C, H, W] in NHWC, of `x` and `residual` of that shape and one dtype;
    otherwise as `group_norm_silu`.
    """
    _check(x, residual, weight, bias, num_groups, channel_bias)
    return _add_group_norm_silu(x, residual, weight, bias, num_groups, eps, silu, channel_bias)


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    channel_bias: Tensor | None,
) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x [B, C, H, W] is needed, not {list(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"a residual as x, {list(x.shape)} {x.dtype}, is needed, not {list(residual.shape)} {residual.dtype}"
        )
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"{num_groups} groups do not divide {x.shape[1]} channels")
    vectors = [weight, bias] if channel_bias is None else [weight, bias, channel_bias]
    for vector in vectors:
        if vector.shape != x.shape[1:2]:
            raise ValueError(
                f"weight, bias and channel_bias must be [{x.shape[1]}], not {list(vector.shape)}"
            )
    for tensor in (x, *vectors):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"tensors must be float32, float16 or bfloat16, not {tensor.dtype}")
