"""What a VQGAN's activations need of float16's range, and the power of two that makes them fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.discretizers.vqgan.fused_layers import Attention, Block, Conv, Down, Sum, Up

if TYPE_CHECKING:
    from dad_fast.discretizers.vqgan.model import VQGAN

HEADROOM = 8.0  # other images may reach so much further than the probed ones
MEASURED = (Conv, Block, Attention, Down, Up)


@dataclass(frozen=True)
class ActivationRange:
    """Largest |activation| in float32 by layer, and the scale of each half: `vqgan.fuse(..., encoder_scale=..., decoder_scale=...)`."""

    encoder: dict[str, float]
    decoder: dict[str, float]

    @property
    def encoder_scale(self) -> float:
        return scale_for(max(self.encoder.values()))

    @property
    def decoder_scale(self) -> float:
        return scale_for(max(self.decoder.values()))


def scale_for(largest: float) -> float:
    """The power of two, 1 at most, that brings `largest` times the headroom into float16's range."""
    if not math.isfinite(largest):
        raise ValueError("activations are not finite even in float32: are the weights damaged?")
    return 2.0 ** min(
        0, math.floor(math.log2(torch.finfo(torch.float16).max / (HEADROOM * max(largest, 1.0))))
    )


def probe_images(side: int, device: torch.device | None = None) -> Tensor:
    """Images [8, 3, side, side] that are the same everywhere and far apart: plain, ramps, stripes, blocks, noise fine and coarse."""
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
        images.append(
            F.interpolate(
                torch.rand(1, 3, coarse, coarse, generator=generator), (side, side), mode="bilinear"
            )[0]
        )
    return torch.stack(images).to(device)


def probe_range(vqgan: VQGAN, pixels: Tensor) -> ActivationRange:
    """Encode and decode `pixels` [B, 3, H, W] in [0,1] in float32 and note every layer's largest output. Reads results on the host."""
    fused = vqgan.fuse()
    largest: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Sum | Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Sum | Tensor) -> None:
            terms = (
                [term for term in output if term is not None]
                if isinstance(output, Sum)
                else [output]
            )
            total = sum(
                term.view(1, -1, 1, 1) if term.ndim == 1 else term for term in terms
            )  # not Sum.total, which adds in place
            largest[name] = total.abs().amax()

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in fused.named_modules()
        if isinstance(module, MEASURED)
    ]
    fused.decode(fused.codes(pixels))
    for handle in handles:
        handle.remove()
    values = {name.replace(".layers.", "."): value.item() for name, value in largest.items()}
    halves = (
        {name: value for name, value in values.items() if name.startswith(half)}
        for half in ("encoder", "decoder")
    )
    return ActivationRange(*halves)
