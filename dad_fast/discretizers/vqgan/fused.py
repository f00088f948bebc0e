"""Inference-only form of a VQGAN: the same function in fewer operations, with a switch for each
optimization.

    fused = FusedVQGAN(vqgan, encoder=torch.float16, decoder=torch.bfloat16)
    codes = fused.codes(pixels)
    images = fused.decode(codes)

FLOP of f8 at 224 px (GF): encode 172.0 -> 169.5 (attention's projections), decode 360.1 -> 307.5
(upsampling -49.3, projections -3.3).
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext

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
from dad_fast.discretizers.vqgan.model import VQGAN, Level, Middle


def _level(plain: Level, recipe: Recipe, name: str) -> dict[str, nn.Module]:
    """Build the layers of a level by name, with underscores for dots, which a module's name cannot
    have.
    """
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
    layers: dict[str, nn.Module] = {"mid_block_1": Block(plain.block_1, recipe)}
    if plain.attn_1 is not None:
        layers["mid_attn_1"] = Attention(plain.attn_1, recipe)
    return {**layers, "mid_block_2": Block(plain.block_2, recipe)}


class _Half(nn.Module):
    """Base of encoder and decoder: recipe and autocast."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.optimizations = recipe.optimizations
        self.dtype = recipe.dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Enable autocast if the weights are not cast beforehand, else disable any surrounding
        autocast.
        """
        # The meta device, which counts shapes and FLOP, has no autocast.
        if device.type == "meta":
            return nullcontext()
        enabled = not self.optimizations.cast and self.dtype in (torch.float16, torch.bfloat16)
        dtype = self.dtype if enabled else torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=enabled)


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
        if self.optimizations.merge_1x1:
            outer, shift = parameters(vqgan.quant_conv)
            inner, bias = parameters(plain.conv_out)
            merged_bias = outer[..., 0, 0] @ bias + shift
            self.conv_out = Conv(compose(outer, inner), merged_bias, last, padding=1)
        else:
            self.conv_out = Conv.like(plain.conv_out, last)
            self.quant_conv = Conv.like(vqgan.quant_conv, last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode `pixels` [B, 3, H, W] in [0, 1] to latents [B, D, H/f, W/f]."""
        x = self.recipe.laid_out((2.0 * pixels - 1.0).to(self.conv_in.weight.dtype))
        x, _ = self.norm_out(self.layers(Sum(self.conv_in(x))))
        x = self.conv_out(x)
        return x if self.quant_conv is None else self.quant_conv(x)


class FusedDecoder(_Half):
    # [K, D], or [K, z_channels] with post_quant_conv merged into it
    table: Tensor

    def __init__(self, vqgan: VQGAN, recipe: Recipe) -> None:
        super().__init__(recipe)
        plain, last = vqgan.decoder, recipe._replace(scale=1.0)
        table = vqgan.codebook.detach().double()
        self.post_quant_conv: Conv | None = None
        if self.optimizations.merge_1x1:
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
        """Decode `codes` int64 [B, h, w] to pixels [B, 3, h*f, w*f] in [0, 1]."""
        # [B, z_channels, h, w], NHWC in memory
        z = F.embedding(codes, self.table).permute(0, 3, 1, 2)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        y, _ = self.norm_out(self.layers(Sum(self.conv_in(z))))
        y = self.conv_out(y)
        # Images are float32: change the range there, without another rounding to the decoder's
        # dtype.
        if self.optimizations.cast:
            y = y.to(torch.promote_types(y.dtype, torch.float32))
        return (y.clamp(-1.0, 1.0) + 1.0) / 2.0


class FusedVQGAN(nn.Module):
    """VQGAN for inference, made from the current weights of `vqgan`, on their device.

    No gradient passes through.

    encoder, decoder: compute dtype of each. encoder_scale, decoder_scale: powers of two that keep
    activations in fp16's range (`float16_range.probe_range`). Latents and pixels differ from the
    plain model in float32 by rounding (1e-5 relative); in 16 bits the error against float64 is at
    most twice that of the plain model under autocast to that dtype.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        optimizations: VQGANOptimizations | None = None,
        *,
        encoder: torch.dtype = torch.float32,
        decoder: torch.dtype = torch.float32,
        encoder_scale: float = 1.0,
        decoder_scale: float = 1.0,
    ) -> None:
        super().__init__()
        wanted = optimizations or VQGANOptimizations()
        self.encoder = FusedEncoder(vqgan, Recipe(wanted, encoder, encoder_scale))
        self.decoder = FusedDecoder(vqgan, Recipe(wanted, decoder, decoder_scale))
        self.lookup = vqgan.lookup
        self._check_sides = vqgan.check_sides

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode `pixels` [B, 3, H, W] in [0, 1] to latents [B, D, H/f, W/f] in the encoder's
        dtype.

        Raises UsageError unless f divides both sides.
        """
        self._check_sides(pixels)
        with self.encoder.autocast(pixels.device):
            return self.encoder(pixels)

    def codes(self, pixels: Tensor) -> Tensor:
        """Encode `pixels` [B, 3, H, W] in [0, 1] to codes int64 [B, H/f, W/f]; the search is exact
        and outside autocast.
        """
        return self.lookup(self.encode(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode `codes` int64 [B, h, w] to pixels float32 [B, 3, h*f, w*f] in [0, 1]."""
        with self.decoder.autocast(codes.device):
            return self.decoder(codes)
