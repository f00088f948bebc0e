"""Layers of a fused VQGAN: frozen tensors in the dtype and memory format of their stage.

Each is built from its plain layer and a `Recipe`. With the recipe's `scale` s, a power of two,
every convolution outputs s times the output of the plain one, so that a residual stream beyond
fp16's range fits; group norm undoes the scale (its eps becomes eps s^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.discretizers.vqgan.model import AttnBlock, Downsample, ResnetBlock, Upsample
from dad_fast.kernels.group_norm_silu import (
    add_group_norm_silu,
    group_norm_silu,
    nhwc_group_norm,
    torch_keeps_nhwc,
)
from dad_fast.kernels.wide_attention import Attend, sdpa_as_given, tokens, wide_attention

# Nearest-2x upsampling followed by a 3-tap kernel is a transposed convolution of stride 2 with
# these 4 taps, in x and in y.
UPSAMPLED_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


@dataclass(frozen=True, kw_only=True)
class VQGANOptimizations:
    """Switches of a fused VQGAN.

    Each is exact in exact arithmetic; with all off the result is bit-equal to the plain model.
    """

    # Cast weights once to the stage's dtype; off: autocast casts them at every call, and norms run
    # in float32
    cast: bool = True
    # NHWC, weights permuted once; norms keep it
    channels_last: bool = True
    # Nearest-2x upsampling and 3x3 convolution as one transposed convolution on the small map: 4/9
    # of the FLOP; on CUDA only where a timing at the start of a run finds it faster
    upsample: bool = True
    # Scores h (Wq Wk) h and values h (Wv Wo): two projections instead of four
    attention: bool = True
    # quant_conv inside conv_out, post_quant_conv inside the codebook
    merge_1x1: bool = True
    # Group norm, SiLU and the preceding bias and residual in one op, on CUDA a Triton kernel; a run
    # turns it on after a self-test (engine/self_test.py)
    norm_kernel: bool = False

    @classmethod
    def none(cls) -> VQGANOptimizations:
        """Return the switches of the plain model: all off."""
        return cls(**dict.fromkeys((field.name for field in fields(cls)), False))


class Recipe(NamedTuple):
    """Settings of one half (encoder or decoder)."""

    optimizations: VQGANOptimizations
    dtype: torch.dtype
    scale: float = 1.0

    def tensor(self, value: Tensor) -> Tensor:
        """Convert a parameter, computed in float64, to its dtype and memory format."""
        dtype = self.dtype if self.optimizations.cast else torch.float32
        value = value.detach().to(dtype).contiguous()
        return self.laid_out(value) if value.ndim == 4 else value

    def laid_out(self, value: Tensor) -> Tensor:
        """Convert a map or weight [N, C, H, W] to NHWC if the recipe asks for it."""
        if self.optimizations.channels_last:
            return value.contiguous(memory_format=torch.channels_last)
        return value


class Sum(NamedTuple):
    """Map x + channel_bias + residual, not yet added up if the op of the next norm does that."""

    x: Tensor  # [B, C, H, W]
    channel_bias: Tensor | None = None  # [C]
    residual: Tensor | None = None  # [B, C, H, W]

    def total(self) -> Tensor:
        """Add up the terms, in place."""
        x = self.x
        if self.channel_bias is not None:
            x = x.add_(self.channel_bias.view(1, -1, 1, 1))
        if self.residual is None:
            return x
        # In place only if that keeps the memory format of the residual stream.
        return x.add_(self.residual) if x.stride() == self.residual.stride() else self.residual + x


class Conv(nn.Module):
    """Convolution with scaled weight [O, I, k, k] and bias [O].

    The recipe's scale applies to the bias, and to the weight unless `weight_scale` is given.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        recipe: Recipe,
        *,
        weight_scale: float | None = None,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.norm_kernel = recipe.optimizations.norm_kernel
        weight_scale = recipe.scale if weight_scale is None else weight_scale
        self.register_buffer("weight", recipe.tensor(weight * weight_scale))
        self.register_buffer("bias", recipe.tensor(bias * recipe.scale))

    @classmethod
    def like(cls, plain: nn.Conv2d, recipe: Recipe, weight_scale: float | None = None) -> Conv:
        """Convert a plain convolution."""
        return cls(
            *parameters(plain),
            recipe,
            weight_scale=weight_scale,
            stride=plain.stride[0],
            padding=int(plain.padding[0]),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def before_norm(self, x: Tensor, residual: Tensor | None = None) -> Sum:
        """Return the output plus `residual` as the input of a norm."""
        if self.norm_kernel:
            y = F.conv2d(x, self.weight, None, self.stride, self.padding)
            return Sum(y, self.bias, residual)
        return Sum(self(x), None, residual)


class Norm(nn.Module):
    """Group norm, then SiLU if `silu`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, plain: nn.GroupNorm, recipe: Recipe, silu: bool = True) -> None:
        super().__init__()
        self.groups = plain.num_groups
        self.eps = plain.eps * recipe.scale**2
        self.silu = silu
        self.kernel = recipe.optimizations.norm_kernel
        is_nhwc = recipe.optimizations.channels_last and recipe.optimizations.cast
        self.norm: Callable[..., Tensor] = F.group_norm
        if is_nhwc and not torch_keeps_nhwc(plain.weight.device):
            self.norm = nhwc_group_norm
        if self.kernel:
            # The kernel computes in float32.
            recipe = recipe._replace(dtype=torch.float32)
        self.register_buffer("weight", recipe.tensor(plain.weight))
        self.register_buffer("bias", recipe.tensor(plain.bias))

    def forward(self, terms: Sum) -> tuple[Tensor, Tensor]:
        """Return the norm of the sum, and the sum.

        In a branch (bias, no residual) the sum is unused and lacks the bias.
        """
        if self.kernel:
            args = (self.weight, self.bias, self.groups, self.eps)
            if terms.residual is not None:
                return add_group_norm_silu(
                    terms.x, terms.residual, *args, silu=self.silu, channel_bias=terms.channel_bias
                )
            y = group_norm_silu(terms.x, *args, silu=self.silu, channel_bias=terms.channel_bias)
            return y, terms.x
        x = terms.total()
        y = self.norm(x, self.groups, self.weight, self.bias, self.eps)
        y = F.silu(y, inplace=True) if self.silu else y
        return y, x


class Block(nn.Module):
    def __init__(self, plain: ResnetBlock, recipe: Recipe) -> None:
        super().__init__()
        self.norm1 = Norm(plain.norm1, recipe)
        self.conv1 = Conv.like(plain.conv1, recipe)
        self.norm2 = Norm(plain.norm2, recipe)
        self.conv2 = Conv.like(plain.conv2, recipe)
        self.shortcut: Conv | None = None
        if plain.nin_shortcut is not None:
            self.shortcut = Conv.like(plain.nin_shortcut, recipe, 1.0)

    def forward(self, terms: Sum) -> Sum:
        h, x = self.norm1(terms)
        h, _ = self.norm2(self.conv1.before_norm(h))
        return self.conv2.before_norm(h, x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """One head over all positions. It is as wide as its input, so four projections become two.

    (Wq h_i + bq) . (Wk h_j + bk) = (Wk' Wq h_i + Wk' bq) . h_j + a term of i alone, which the
    softmax over j drops; Wo sum_j a_ij (Wv h_j + bv) + bo = Wo Wv sum_j a_ij h_j + Wo bv + bo,
    because the a_ij of one i sum to 1.
    """

    def __init__(self, plain: AttnBlock, recipe: Recipe) -> None:
        super().__init__()
        self.norm = Norm(plain.norm, recipe, silu=False)
        self.scale = 1 / math.sqrt(plain.q.out_channels) / recipe.scale
        self.attend: Attend = sdpa_as_given
        self.k: Conv | None = None
        self.v: Conv | None = None
        if recipe.optimizations.attention:
            self.attend = wide_attention(plain.q.weight.device, plain.q.out_channels)
            wq, bq = parameters(plain.q)
            wk, _ = parameters(plain.k)
            wv, bv = parameters(plain.v)
            wo, bo = parameters(plain.proj_out)
            self.q = Conv(compose(wk.transpose(0, 1), wq), wk[..., 0, 0].T @ bq, recipe)
            self.proj_out = Conv(compose(wo, wv), wo[..., 0, 0] @ bv + bo, recipe)
        else:
            self.q = Conv.like(plain.q, recipe)
            self.k = Conv.like(plain.k, recipe)
            self.v = Conv.like(plain.v, recipe)
            # v has the scale already, and q and k have it twice together.
            self.proj_out = Conv.like(plain.proj_out, recipe, 1.0)
            self.scale /= recipe.scale

    def forward(self, terms: Sum) -> Sum:
        h, x = self.norm(terms)
        maps = (h if conv is None else conv(h) for conv in (self.q, self.k, self.v))
        q, k, v = map(tokens, maps)  # [B, HW, C], dense where the maps are NHWC
        h = self.attend(q, k, v, self.scale)
        return self.proj_out.before_norm(h.transpose(1, 2).unflatten(2, x.shape[2:]), x)


class Down(nn.Module):
    def __init__(self, plain: Downsample, recipe: Recipe) -> None:
        super().__init__()
        self.conv = Conv.like(plain.conv, recipe, 1.0)

    def forward(self, terms: Sum) -> Sum:
        return Sum(self.conv(F.pad(terms.total(), (0, 1, 0, 1))))


class Up(nn.Module):
    def __init__(self, plain: Upsample, recipe: Recipe) -> None:
        super().__init__()
        self.transposed = recipe.optimizations.upsample
        if self.transposed:
            weight, bias = parameters(plain.conv)
            taps = weight.new_tensor(UPSAMPLED_TAPS)
            transposed = torch.einsum("ty,sx,oiyx->iots", taps, taps, weight)
            self.conv = Conv(transposed, bias, recipe, weight_scale=1.0)
        else:
            self.conv = Conv.like(plain.conv, recipe, 1.0)

    def forward(self, terms: Sum) -> Sum:
        x = terms.total()
        if self.transposed:
            return Sum(F.conv_transpose2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1))
        return Sum(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


def parameters(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias in float64, in which they are merged and scaled."""
    assert layer.bias is not None
    return layer.weight.detach().double(), layer.bias.detach().double()


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the weight [O, I, k, k] of the 1x1 `outer` [O, M, 1, 1] after `inner` [M, I, k, k]."""
    return torch.einsum("om,mikl->oikl", outer[..., 0, 0], inner)
