"""Discretizers Q: pixels -> the nearest image that codes can say. VQGAN, JPEG, and identity as the ablation."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dad_fast.config.schema import PrecisionConfig
from dad_fast.errors import UsageError
from dad_fast.models.vqgan import VQGAN
from dad_fast.models.weights import asset, sha256_file


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
    """A frozen VQGAN. Under `precision.amp` encoder and decoder run in their own dtypes; the lookup is always exact."""

    def __init__(
        self, vqgan: VQGAN, precision: PrecisionConfig, *, name: str = "vqgan", provenance: str = "", weights_sha256: str | None = None
    ) -> None:
        self.vqgan = vqgan.eval().requires_grad_(False)
        self.precision, self.name, self.provenance, self.weights_sha256 = precision, name, provenance, weights_sha256

    def __call__(self, pixels: Tensor) -> Discretized:
        with torch.no_grad():
            codes = self.vqgan.lookup(self.encode(pixels))
        return Discretized(self.decode(codes), codes)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, D, h, w] in the precision of the run."""
        with torch.no_grad(), self._autocast(self.precision.encoder, pixels):
            return self.vqgan.encode(pixels)

    def decode(self, codes: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] in [0, 1] of `codes` int64 [B, h, w], decoded in the precision of the run."""
        with torch.no_grad(), self._autocast(self.precision.decoder, codes):
            return self.vqgan.decode(codes).float()

    def _autocast(self, dtype: str, where: Tensor) -> AbstractContextManager[None]:
        return torch.autocast(where.device.type, getattr(torch, dtype), enabled=self.precision.amp and dtype != "float32")


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


def load_discretizer(name: str, precision: PrecisionConfig, device: torch.device) -> Discretizer:
    """FILE (.ckpt or .safetensors of a VQGAN), `embedded:digits`, `identity` or `jpeg:QUALITY`.

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
    return VQGANDiscretizer(vqgan.to(device), precision, name=name, provenance=seen, weights_sha256=sha256_file(path))
