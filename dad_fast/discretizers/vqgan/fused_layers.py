"""Layers of a fused VQGAN (`vqgan_fused`): frozen tensors prepared once, in the dtype and memory format of their stage.

Each is built from its plain layer and a `Recipe`. The recipe's `scale` s, a power of two, makes every convolution write s times what the
plain one writes, so that a residual stream beyond fp16's range fits; group norm undoes it (its eps becomes eps s^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.discretizers.vqgan.model import AttnBlock, Downsample, ResnetBlock, Upsample
from dad_fast.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu
from dad_fast.kernels.wide_attention import wide_attention

# Nearest-2x upsampling and then a 3-tap kernel is a transposed convolution of stride 2 with these 4 taps (the same in x and y).
UPSAMPLED_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


@dataclass(frozen=True, kw_only=True)
class VQGANOptimizations:
    """What a fused VQGAN saves. Each is exact in exact arithmetic, and with all of them off it is bit-equal to the plain one."""

    cast: bool = True  # weights in the stage's dtype once; off: autocast casts them at every call, and norms run in float32
    channels_last: bool = True  # NHWC, weights permuted once; on CUDA the group norm of older PyTorch leaves it again, norm_kernel never
    upsample: bool = True  # nearest-2x and 3x3 convolution as one transposed convolution on the small map: 4/9 of the FLOP
    attention: bool = (
        True  # scores h (Wq Wk) h and values h (Wv Wo): two projections instead of four
    )
    merge_1x1: bool = True  # quant_conv inside conv_out, post_quant_conv inside the codebook
    norm_kernel: bool = False  # group norm, SiLU and the bias and residual before them in one op; on CUDA a Triton kernel not yet run there

    @classmethod
    def none(cls) -> VQGANOptimizations:
        return cls(**dict.fromkeys((field.name for field in fields(cls)), False))


class Recipe(NamedTuple):
    """How one half (encoder or decoder) is made."""

    savings: VQGANOptimizations
    dtype: torch.dtype
    scale: float = 1.0

    def tensor(self, value: Tensor) -> Tensor:
        """A parameter, computed in float64, as it is kept."""
        value = value.detach().to(self.dtype if self.savings.cast else torch.float32).contiguous()
        return self.laid_out(value) if value.ndim == 4 else value

    def laid_out(self, value: Tensor) -> Tensor:
        """A map or weight [N, C, H, W] in the recipe's memory format; where that is not chosen, as it comes."""
        return (
            value.contiguous(memory_format=torch.channels_last)
            if self.savings.channels_last
            else value
        )


class Sum(NamedTuple):
    """A map x + channel_bias + residual, not yet added up where the op of the next norm does that."""

    x: Tensor  # [B, C, H, W]
    channel_bias: Tensor | None = None  # [C]
    residual: Tensor | None = None  # [B, C, H, W]

    def total(self) -> Tensor:
        x = (
            self.x
            if self.channel_bias is None
            else self.x.add_(self.channel_bias.view(1, -1, 1, 1))
        )
        if self.residual is None:
            return x
        # In place where that leaves the residual stream in its memory format.
        return x.add_(self.residual) if x.stride() == self.residual.stride() else self.residual + x


class Conv(nn.Module):
    """Its weight [O, I, k, k] is taken times `weight_scale` (default: the recipe's scale), its bias [O] times that scale."""

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
        self.stride, self.padding, self.norm_kernel = stride, padding, recipe.savings.norm_kernel
        self.register_buffer(
            "weight",
            recipe.tensor(weight * (recipe.scale if weight_scale is None else weight_scale)),
        )
        self.register_buffer("bias", recipe.tensor(bias * recipe.scale))

    @classmethod
    def like(cls, plain: nn.Conv2d, recipe: Recipe, weight_scale: float | None = None) -> Conv:
        stride, padding = plain.stride[0], plain.padding[0]
        return cls(
            *parameters(plain),
            recipe,
            weight_scale=weight_scale,
            stride=stride,
            padding=int(padding),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def before_norm(self, x: Tensor, residual: Tensor | None = None) -> Sum:
        """The same plus `residual`, for a norm to take."""
        if self.norm_kernel:
            return Sum(
                F.conv2d(x, self.weight, None, self.stride, self.padding), self.bias, residual
            )
        return Sum(self(x), None, residual)


class Norm(nn.Module):
    """Group norm, then SiLU where `silu`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, plain: nn.GroupNorm, recipe: Recipe, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.eps, self.silu, self.kernel = (
            plain.num_groups,
            plain.eps * recipe.scale**2,
            silu,
            recipe.savings.norm_kernel,
        )
        if self.kernel:
            recipe = recipe._replace(dtype=torch.float32)  # in which it computes
        self.register_buffer("weight", recipe.tensor(plain.weight))
        self.register_buffer("bias", recipe.tensor(plain.bias))

    def forward(self, terms: Sum) -> tuple[Tensor, Tensor]:
        """The norm of the sum; and the sum, which in a branch (a bias and no residual) nobody reads and which then lacks the bias."""
        if self.kernel:
            args = (self.weight, self.bias, self.groups, self.eps)
            if terms.residual is not None:
                return add_group_norm_silu(
                    terms.x, terms.residual, *args, silu=self.silu, channel_bias=terms.channel_bias
                )
            return group_norm_silu(
                terms.x, *args, silu=self.silu, channel_bias=terms.channel_bias
            ), terms.x
        x = terms.total()
        y = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return F.silu(y, inplace=True) if self.silu else y, x


class Block(nn.Module):
    def __init__(self, plain: ResnetBlock, recipe: Recipe) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(plain.norm1, recipe), Conv.like(plain.conv1, recipe)
        self.norm2, self.conv2 = Norm(plain.norm2, recipe), Conv.like(plain.conv2, recipe)
        self.shortcut = (
            None if plain.nin_shortcut is None else Conv.like(plain.nin_shortcut, recipe, 1.0)
        )

    def forward(self, terms: Sum) -> Sum:
        h, x = self.norm1(terms)
        h, _ = self.norm2(self.conv1.before_norm(h))
        return self.conv2.before_norm(h, x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """One head over all positions, as wide as its input: so that its four projections lose nothing by becoming two.

    (Wq h_i + bq) . (Wk h_j + bk) = (Wk' Wq h_i + Wk' bq) . h_j + what depends on i alone, which the softmax over j drops;
    Wo sum_j a_ij (Wv h_j + bv) + bo = Wo Wv sum_j a_ij h_j + Wo bv + bo, because the a_ij of one i sum to 1.
    """

    def __init__(self, plain: AttnBlock, recipe: Recipe) -> None:
        super().__init__()
        self.norm = Norm(plain.norm, recipe, silu=False)
        self.scale = 1 / math.sqrt(plain.q.out_channels) / recipe.scale
        self.attend = wide_attention(plain.q.weight.device, plain.q.out_channels)
        self.k = self.v = None
        if recipe.savings.attention:
            (wq, bq), (wk, _), (wv, bv), (wo, bo) = map(
                parameters, (plain.q, plain.k, plain.v, plain.proj_out)
            )
            self.q = Conv(compose(wk.transpose(0, 1), wq), wk[..., 0, 0].T @ bq, recipe)
            self.proj_out = Conv(compose(wo, wv), wo[..., 0, 0] @ bv + bo, recipe)
        else:
            self.q, self.k, self.v = (
                Conv.like(conv, recipe) for conv in (plain.q, plain.k, plain.v)
            )
            self.proj_out = Conv.like(plain.proj_out, recipe, 1.0)  # v has the scale
            self.scale /= recipe.scale  # so have both q and k

    def forward(self, terms: Sum) -> Sum:
        h, x = self.norm(terms)
        maps = (h if conv is None else conv(h) for conv in (self.q, self.k, self.v))
        q, k, v = (each.flatten(2).transpose(1, 2) for each in maps)  # [B, HW, C]
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
        self.transposed = recipe.savings.upsample
        if self.transposed:
            weight, bias = parameters(plain.conv)
            taps = weight.new_tensor(UPSAMPLED_TAPS)
            self.conv = Conv(
                torch.einsum("ty,sx,oiyx->iots", taps, taps, weight), bias, recipe, weight_scale=1.0
            )
        else:
            self.conv = Conv.like(plain.conv, recipe, 1.0)

    def forward(self, terms: Sum) -> Sum:
        x = terms.total()
        if self.transposed:
            return Sum(F.conv_transpose2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1))
        return Sum(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


def parameters(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, in which they are merged and scaled."""
    assert layer.bias is not None
    return layer.weight.detach().double(), layer.bias.detach().double()


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The weight of the 1x1 convolution `outer` [O, M, 1, 1] after `inner` [M, I, k, k]."""
    return torch.einsum("om,mikl->oikl", outer[..., 0, 0], inner)
