"""Range of a VQGAN's activations, and the power of two that makes them fit float16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.discretizers.vqgan.fused import FusedVQGAN
from dad_fast.discretizers.vqgan.fused_layers import Attention, Block, Conv, Down, Sum, Up
from dad_fast.discretizers.vqgan.model import VQGAN

# Factor by which activations of other images may exceed those of the probed ones
HEADROOM = 8.0
MEASURED = (Conv, Block, Attention, Down, Up)


@dataclass(frozen=True)
class ActivationRange:
    """Largest |activation| in float32 by layer, and the scale of each half for `FusedVQGAN`."""

    encoder: dict[str, float]
    decoder: dict[str, float]

    @property
    def encoder_scale(self) -> float:
        return scale_for(max(self.encoder.values()))

    @property
    def decoder_scale(self) -> float:
        return scale_for(max(self.decoder.values()))


def scale_for(largest: float) -> float:
    """Return the power of two, at most 1, that fits `largest` times the headroom into float16."""
    if not math.isfinite(largest):
        raise ValueError("activations are not finite even in float32: are the weights damaged?")
    room = torch.finfo(torch.float16).max / (HEADROOM * max(largest, 1.0))
    return 2.0 ** min(0, math.floor(math.log2(room)))


def probe_images(side: int, device: torch.device | None = None) -> Tensor:
    """Return images [8, 3, side, side]: plain, ramps, stripes, blocks, fine and coarse noise."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, side)
    line = (torch.arange(side) // 2 % 2).float()
    block = (torch.arange(side) // 8 % 2).float()
    grey = [
        torch.zeros(side, side),
        torch.ones(side, side),
        ramp.expand(side, side),
        line.expand(side, side),
    ]
    images = [image.expand(3, side, side) for image in grey]
    images.append(
        torch.stack([ramp.outer(ramp), block.outer(ramp), (block[:, None] - block).abs()])
    )
    images.append(torch.rand(3, side, side, generator=generator))
    for coarse in (side // 8, side // 4):
        noise = torch.rand(1, 3, coarse, coarse, generator=generator)
        images.append(F.interpolate(noise, (side, side), mode="bilinear")[0])
    return torch.stack(images).to(device)


def probe_range(vqgan: VQGAN, pixels: Tensor) -> ActivationRange:
    """Measure the largest output of every layer in float32 on `pixels` [B, 3, H, W] in [0, 1].

    Reads the results on the host.
    """
    fused = FusedVQGAN(vqgan)
    largest: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Sum | Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Sum | Tensor) -> None:
            terms = output if isinstance(output, Sum) else [output]
            # Not Sum.total, which adds in place.
            total = sum(
                term.view(1, -1, 1, 1) if term.ndim == 1 else term
                for term in terms
                if term is not None
            )
            largest[name] = total.abs().amax()

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in fused.named_modules()
        if isinstance(module, MEASURED)
    ]
    fused.decode(fused.codes(pixels))
    for handle in handles:
        handle.remove()
    values = {name.replace(".layers.", "."): value.item() for name, value in largest.items()}
    encoder = {name: value for name, value in values.items() if name.startswith("encoder")}
    decoder = {name: value for name, value in values.items() if name.startswith("decoder")}
    return ActivationRange(encoder, decoder)
