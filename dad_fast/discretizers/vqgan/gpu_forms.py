"""Sizes of a VQGAN's maps, and the choices that follow: how many images at once, the shapes of its
norms, the faster form of its upsampling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dad_fast.discretizers.vqgan.config import VQGANConfig
from dad_fast.discretizers.vqgan.fused import FusedVQGAN
from dad_fast.discretizers.vqgan.fused_layers import Norm, Recipe, Sum, Up
from dad_fast.discretizers.vqgan.model import VQGAN, Decoder
from dad_fast.kernels.group_norm_silu import NormMap

# Kernels of other libraries count the values of a map in 32 bits.
MOST_VALUES = 2**31 - 1
# Of the largest map on a GPU. Encoder and decoder hold about four such maps at once.
MOST_BYTES = 2 << 30


def micro_batch_size(batch_size: int, values: int, itemsize: int) -> int:
    """Return how many images to take at once, the whole batch if it fits.

    values: of an image's largest map. itemsize: its bytes per value on a GPU; 0 elsewhere, where
    only the number of values is limited. Takes a divisor of the batch size if there is one near
    the limit, so that all parts have one shape.
    """
    most = MOST_VALUES // values
    if itemsize:
        most = min(most, MOST_BYTES // (values * itemsize))
    if batch_size <= most:
        return batch_size
    most = max(1, most)
    num_parts = -(-batch_size // most)
    even = -(-batch_size // num_parts)
    near = range(most, even // 2, -1)
    return next((size for size in near if batch_size % size == 0), even)


def norm_maps(fused: FusedVQGAN, config: VQGANConfig, side: int) -> list[NormMap]:
    """Return the shapes of the norms of `fused` on images of `side` pixels, each once.

    Computed on the meta device: nothing runs.
    """
    found: dict[NormMap, None] = {}

    def note(norm: Any, args: tuple[Sum, ...]) -> None:
        x, bias, residual = args[0]
        _, channels, height, width = x.shape
        settings = norm.groups, norm.eps, norm.silu, x.dtype
        terms = bias is not None, residual is not None
        found[NormMap(channels, height, width, *settings, *terms)] = None

    encoder, decoder = fused.encoder.recipe, fused.decoder.recipe
    with torch.device("meta"):
        shapes = FusedVQGAN(
            VQGAN(config),
            replace(encoder.optimizations, norm_kernel=True),
            encoder=encoder.dtype,
            decoder=decoder.dtype,
            encoder_scale=encoder.scale,
            decoder_scale=decoder.scale,
        )
        for module in shapes.modules():
            if isinstance(module, Norm):
                module.register_forward_pre_hook(note)
        latents = shapes.encode(torch.empty(1, config.in_channels, side, side))
        shapes.decode(torch.empty(1, *latents.shape[2:], dtype=torch.int64))
    return list(found)


def upsampling_times(
    decoder: Decoder, recipe: Recipe, side: int, batch_size: int
) -> tuple[float, float]:
    """Return milliseconds of all upsampling layers, folded and plain, on this GPU."""
    times = []
    for folded in (True, False):
        form = recipe._replace(optimizations=replace(recipe.optimizations, upsample=folded))
        total = 0.0
        for level, layers in enumerate(decoder.up):
            if not hasattr(layers, "upsample"):
                continue
            up = Up(layers.upsample, form)
            shape = batch_size, layers.upsample.conv.in_channels, side >> level, side >> level
            x = torch.randn(shape, dtype=recipe.dtype, device=up.conv.weight.device)
            total += milliseconds(up, Sum(recipe.laid_out(x)))
        times.append(total)
    return times[0], times[1]


def milliseconds(layer: Up, terms: Sum) -> float:
    """Return the median time of a layer on a GPU."""
    from triton.testing import do_bench

    with torch.no_grad(), torch.cuda.device_of(terms.x):
        return float(do_bench(lambda: layer(terms), warmup=5, rep=20, return_mode="median"))
