"""An inference-only form of a VQGAN: the same function in fewer operations, each saving behind a switch of its own (`VQGANOptimizations`).

    fused = vqgan.fuse(encoder=torch.float16, decoder=torch.bfloat16)
    codes = fused.codes(pixels)
    images = fused.decode(codes)

FLOP of f8 at 224 px (GF): encode 172.0 -> 169.5 (attention's projections), decode 360.1 -> 307.5 (upsampling -49.3, projections -3.3).
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.discretizers.vqgan.fused_layers import (
    Attention,
    Block,
    Conv,
    Down,
    Norm,
    Recipe,
    Sum,
    Up,
    VQGANOptimizations,
    compose,
    parameters,
)

if TYPE_CHECKING:
    from dad_fast.discretizers.vqgan.model import VQGAN, Level, Middle

__all__ = ["FusedVQGAN", "VQGANOptimizations"]


def _level(plain: Level, recipe: Recipe, name: str) -> dict[str, nn.Module]:
    """Its layers by name; dots, which a module's name cannot have, become underscores."""
    layers: dict[str, nn.Module] = {}
    for i, block in enumerate(plain.block):
        layers[f"{name}_block_{i}"] = Block(block, recipe)
        if plain.attn:
            layers[f"{name}_attn_{i}"] = Attention(plain.attn[i], recipe)
    if hasattr(plain, "downsample"):
        layers[f"{name}_downsample"] = Down(plain.downsample, recipe)
    if hasattr(plain, "upsample"):
        layers[f"{name}_upsample"] = Up(plain.upsample, recipe)
    return layers


def _middle(plain: Middle, recipe: Recipe) -> dict[str, nn.Module]:
    first, second = Block(plain.block_1, recipe), Block(plain.block_2, recipe)
    return {
        "mid_block_1": first,
        "mid_attn_1": Attention(plain.attn_1, recipe),
        "mid_block_2": second,
    }


class _Half(nn.Module):
    """What encoder and decoder share: the layers between the first convolution and the last, and the precision around them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.savings, self.dtype = recipe, recipe.savings, recipe.dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Autocast where it casts the weights; else none, whatever surrounds the call."""
        if device.type == "meta":  # where shapes and FLOP are counted there is none
            return nullcontext()
        enabled = not self.savings.cast and self.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(
            device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled
        )


class FusedEncoder(_Half):
    def __init__(self, vqgan: VQGAN, recipe: Recipe) -> None:
        super().__init__(recipe)
        plain, last = vqgan.encoder, recipe._replace(scale=1.0)
        self.conv_in = Conv.like(plain.conv_in, recipe)
        layers: dict[str, nn.Module] = {}
        for i, level in enumerate(plain.down):
            layers |= _level(level, recipe, f"down_{i}")
        self.layers = nn.Sequential(OrderedDict(layers | _middle(plain.mid, recipe)))
        self.norm_out = Norm(plain.norm_out, recipe)
        self.quant_conv: Conv | None = None
        if self.savings.merge_1x1:
            (outer, shift), (inner, bias) = parameters(vqgan.quant_conv), parameters(plain.conv_out)
            self.conv_out = Conv(
                compose(outer, inner), outer[..., 0, 0] @ bias + shift, last, padding=1
            )
        else:
            self.conv_out, self.quant_conv = (
                Conv.like(plain.conv_out, last),
                Conv.like(vqgan.quant_conv, last),
            )

    def forward(self, pixels: Tensor) -> Tensor:
        """Latents [B, D, H/f, W/f] of `pixels` [B, 3, H, W] in [0,1]."""
        x = self.recipe.laid_out((2.0 * pixels - 1.0).to(self.conv_in.weight.dtype))
        x, _ = self.norm_out(self.layers(Sum(self.conv_in(x))))
        x = self.conv_out(x)
        return x if self.quant_conv is None else self.quant_conv(x)


class FusedDecoder(_Half):
    table: Tensor  # [K, D], or [K, z_channels] with post_quant_conv in it

    def __init__(self, vqgan: VQGAN, recipe: Recipe) -> None:
        super().__init__(recipe)
        plain, last = vqgan.decoder, recipe._replace(scale=1.0)
        table = vqgan.codebook.detach().double()
        self.post_quant_conv: Conv | None = None
        if self.savings.merge_1x1:
            weight, bias = parameters(vqgan.post_quant_conv)
            table = torch.addmm(bias, table, weight[..., 0, 0].T)
        else:
            self.post_quant_conv = Conv.like(vqgan.post_quant_conv, last)
        self.register_buffer("table", recipe.tensor(table))
        self.conv_in = Conv.like(plain.conv_in, recipe)
        layers = _middle(plain.mid, recipe)
        for i in reversed(range(len(plain.up))):
            layers |= _level(plain.up[i], recipe, f"up_{i}")
        self.layers = nn.Sequential(OrderedDict(layers))
        self.norm_out = Norm(plain.norm_out, recipe)
        self.conv_out = Conv.like(plain.conv_out, last)

    def forward(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, h*f, w*f] in [0,1] of `codes` int64 [B, h, w]."""
        z = F.embedding(codes, self.table).permute(
            0, 3, 1, 2
        )  # [B, z_channels, h, w], NHWC in memory
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        y, _ = self.norm_out(self.layers(Sum(self.conv_in(z))))
        y = self.conv_out(y)
        if self.savings.cast:  # images are wanted in float32, where the range is changed without rounding to the decoder's dtype again
            y = y.to(torch.promote_types(y.dtype, torch.float32))
        return (y.clamp(-1.0, 1.0) + 1.0) / 2.0


class FusedVQGAN(nn.Module):
    """A VQGAN for inference, made of the weights that `vqgan` has now, on the device where they are now. No gradient passes.

    encoder, decoder: the dtype in which each computes. encoder_scale, decoder_scale: powers of two that keep activations in fp16's range
    (`vqgan_fused_range.probe_range`). Against the plain model in float32 the latents and pixels differ by rounding (1e-5 relative); in
    16 bits the error against float64 is at most twice that of the plain model under autocast to the same dtype.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        savings: VQGANOptimizations | None = None,
        *,
        encoder: torch.dtype = torch.float32,
        decoder: torch.dtype = torch.float32,
        encoder_scale: float = 1.0,
        decoder_scale: float = 1.0,
    ) -> None:
        super().__init__()
        savings = VQGANOptimizations() if savings is None else savings
        self.encoder = FusedEncoder(vqgan, Recipe(savings, encoder, encoder_scale))
        self.decoder = FusedDecoder(vqgan, Recipe(savings, decoder, decoder_scale))
        self.lookup, self._check_sides = vqgan.lookup, vqgan.check_sides

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, D, H/f, W/f], in the encoder's dtype, of `pixels` [B, 3, H, W] in [0,1]. UsageError where f divides neither side."""
        self._check_sides(pixels)
        with self.encoder.autocast(pixels.device):
            return self.encoder(pixels)

    def codes(self, pixels: Tensor) -> Tensor:
        """Codes int64 [B, H/f, W/f] of `pixels` [B, 3, H, W] in [0,1]; the search is exact and outside autocast."""
        return self.lookup(self.encode(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, h*f, w*f] in [0,1], float32, of `codes` int64 [B, h, w]."""
        with self.decoder.autocast(codes.device):
            return self.decoder(codes)
