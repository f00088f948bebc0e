"""Discretizers Q: pixels -> the nearest image that codes can say. VQGAN, JPEG, and identity as the ablation."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.vqgan.float16_range import probe_images, probe_range
from dad_fast.discretizers.vqgan.fused_layers import VQGANSavings
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.discretizers.vqgan.precision import stage_dtype
from dad_fast.errors import UsageError
from dad_fast.models.weights.files import asset, sha256_file

DEFAULT_SAVINGS = VQGANSavings()


class Discretized(NamedTuple):
    images: Tensor  # float32 [B, 3, H, W] in [0, 1]
    codes: Tensor | None  # int64 [B, h, w]; None where the discretizer has no codes


class Discretizer(Protocol):
    """Called on pixels float32 [B, 3, H, W] in [0, 1]; no gradient passes through."""

    name: str
    provenance: str  # what it has seen
    weights_sha256: str | None

    def __call__(self, pixels: Tensor) -> Discretized: ...


class VQGANDiscretizer:
    """A frozen VQGAN. Under `precision.amp` encoder and decoder run fused, each in its own dtype; the lookup is always exact.

    Without amp it is the plain model in float32, bit for bit. `savings`: what the fused form saves; None keeps the plain model
    under autocast.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        precision: PrecisionConfig,
        *,
        savings: VQGANSavings | None = DEFAULT_SAVINGS,
        name: str = "vqgan",
        provenance: str = "",
        weights_sha256: str | None = None,
    ) -> None:
        self.vqgan = vqgan.eval().requires_grad_(False)
        self.precision, self.name, self.provenance, self.weights_sha256 = precision, name, provenance, weights_sha256
        self.savings = (savings or VQGANSavings.none()) if precision.amp else VQGANSavings.none()
        self.encoder_scale = self.decoder_scale = 1.0
        self.range_note = ""  # what fit_float16 did, for the log
        self._fuse()

    def __call__(self, pixels: Tensor) -> Discretized:
        codes = self.vqgan.lookup(self.encode(pixels))
        return Discretized(self.decode(codes), codes)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, D, h, w] in the precision of the run."""
        return self.fused.encode(pixels)

    def decode(self, codes: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] in [0, 1] of `codes` int64 [B, h, w], decoded in the precision of the run."""
        return self.fused.decode(codes).float()

    def fit_float16(self, pixels: Tensor | None = None) -> str:
        """Scale what runs in float16 so that its activations fit; a line on what was done, "" for nothing.

        Judged by `pixels` [B, 3, H, W], or by synthetic images (8 times further than those reach still fits). To be called before
        training: it runs encoder and decoder in float32 and reads the result on the host.
        """
        halves = [half for half in ("encoder", "decoder") if stage_dtype(self.precision, half) == torch.float16]
        if not halves:
            return ""
        if pixels is None:
            pixels = probe_images(8 * self.vqgan.downsample, self.vqgan.codebook.device)
        found, lines = probe_range(self.vqgan, pixels), []
        for half in halves:
            scale: float = getattr(found, f"{half}_scale")
            setattr(self, f"{half}_scale", scale)
            if scale < 1.0:
                layer, largest = max(getattr(found, half).items(), key=lambda item: item[1])
                lines.append(f"{layer} reaches {largest:.3g}: the {half} runs at 2^{round(math.log2(scale))} of its scale to fit float16")
        self._fuse()
        self.range_note = "; ".join(lines)
        return self.range_note

    def _fuse(self) -> None:
        self.fused = self.vqgan.fuse(
            self.savings,
            encoder=stage_dtype(self.precision, "encoder"),
            decoder=stage_dtype(self.precision, "decoder"),
            encoder_scale=self.encoder_scale,
            decoder_scale=self.decoder_scale,
        )


class Identity:
    """No discretizer: the ablation that keeps the attack's noise."""

    name, provenance = "identity", "nothing: it changes nothing"
    weights_sha256: str | None = None

    def __call__(self, pixels: Tensor) -> Discretized:
        return Discretized(pixels.detach(), None)


class Jpeg:
    """JPEG compression (4:2:0) by Pillow on the host: another code for images, with no learned part."""

    provenance = "nothing: it is not trained"
    weights_sha256: str | None = None

    def __init__(self, quality: int) -> None:
        self.quality, self.name = quality, f"jpeg:{quality}"

    def __call__(self, pixels: Tensor) -> Discretized:
        levels = (pixels.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
        decoded = np.stack([self._round_trip(image) for image in levels])
        images = torch.from_numpy(decoded).to(pixels.device).permute(0, 3, 1, 2).float().div(255.0)
        return Discretized(images.contiguous(), None)

    def _round_trip(self, levels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file))


def load_discretizer(
    name: str, precision: PrecisionConfig, device: torch.device, savings: VQGANSavings | None = DEFAULT_SAVINGS
) -> Discretizer:
    """FILE (.ckpt or .safetensors of a VQGAN), `embedded:digits`, `identity` or `jpeg:QUALITY`; `savings` as in VQGANDiscretizer.

    Raises UsageError for a name that is none of these, DataError for a file that cannot be used.
    """
    if name == "identity":
        return Identity()
    if name.startswith("jpeg"):
        quality = name.partition(":")[2]
        if not quality.isdecimal() or not 1 <= int(quality) <= 100:
            raise UsageError(f"--discretizer {name}: write jpeg:QUALITY with a quality from 1 to 100, such as jpeg:75")
        return Jpeg(int(quality))
    if not name.startswith("embedded:") and not Path(name).suffix and not Path(name).is_file():
        raise UsageError(f"--discretizer {name!r}: no such file; write a .ckpt or .safetensors, embedded:digits, identity, or jpeg:75")
    path = asset(f"{name.removeprefix('embedded:')}-vqgan.safetensors") if name.startswith("embedded:") else name
    vqgan, seen = VQGAN.load_with_provenance(path)
    known = {"name": name, "provenance": seen, "weights_sha256": sha256_file(path)}
    discretizer = VQGANDiscretizer(vqgan.to(device), precision, savings=savings, **known)
    discretizer.fit_float16()
    return discretizer
