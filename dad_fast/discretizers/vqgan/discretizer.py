"""A frozen VQGAN as a discretizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.base import Discretized, Discretizer, LoadContext
from dad_fast.discretizers.vqgan.float16_range import probe_images, probe_range
from dad_fast.discretizers.vqgan.fused_layers import VQGANOptimizations
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.discretizers.vqgan.precision import stage_dtype
from dad_fast.kernels import unpack_codes
from dad_fast.models.weights.files import asset, fingerprint, sha256_file

DEFAULT_OPTIMIZATIONS = VQGANOptimizations()


class VQGANDiscretizer(Discretizer):
    """A frozen VQGAN. Under `precision.amp` encoder and decoder run fused, each in its own dtype; the lookup is always exact.

    Without amp it is the plain model in float32, bit for bit. `savings`: what the fused form saves; None keeps the plain model
    under autocast.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        precision: PrecisionConfig,
        *,
        savings: VQGANOptimizations | None = DEFAULT_OPTIMIZATIONS,
        name: str = "vqgan",
        provenance: str = "",
        weights_sha256: str | None = None,
    ) -> None:
        self.vqgan = vqgan.eval().requires_grad_(False)
        self.precision, self.name, self.provenance, self.weights_sha256 = (
            precision,
            name,
            provenance,
            weights_sha256,
        )
        self.savings = (
            (savings or VQGANOptimizations.none()) if precision.amp else VQGANOptimizations.none()
        )
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

        EvalSet by `pixels` [B, 3, H, W], or by synthetic images (8 times further than those reach still fits). To be called before
        training: it runs encoder and decoder in float32 and reads the result on the host.
        """
        halves = [
            half
            for half in ("encoder", "decoder")
            if stage_dtype(self.precision, half) == torch.float16
        ]
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
                lines.append(
                    f"{layer} reaches {largest:.3g}: the {half} runs at 2^{round(math.log2(scale))} of its scale to fit float16"
                )
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

    @property
    def codebook(self) -> Tensor:
        return self.vqgan.codebook

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return self.vqgan.config.code_bits

    @property
    def backend(self) -> str:  # type: ignore[override]
        return self.vqgan.search().backend

    def code_grid(self, side: int) -> tuple[int, ...]:
        return (side // self.vqgan.config.downsample,) * 2

    def decode_packed(self, packed: Tensor, grid: tuple[int, ...]) -> Tensor:
        codes = unpack_codes(packed, self.code_bits, math.prod(grid))
        return self.decode(codes.view(-1, *grid))

    def fingerprint(self) -> str:
        return fingerprint(self.vqgan)

    def notes(self) -> list[str]:
        return [self.range_note] if self.range_note else []

    def warnings(self) -> list[str]:
        count = int(self.vqgan.search().num_nonfinite)
        if not count:
            return []
        what = f"{count:,} of the encoder's outputs so far were not finite and got code 0"
        return [f"{what}; set precision.encoder=float32, or look at the VQGAN's weights"]

    def encoders(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        exact = copy.deepcopy(self.vqgan).double()
        return self.encode, lambda pixels: exact.encode(pixels.double())

    def stages(self) -> list[tuple[object, str, str]]:
        return [
            (self, "encode", "encode"),
            (self, "decode", "decode"),
            (self.vqgan, "lookup", "lookup"),
        ]


def load_file(argument: str, context: LoadContext) -> VQGANDiscretizer:
    """A VQGAN's .ckpt or .safetensors; the whole name is its path. Raises DataError for a file that cannot be used."""
    return _load(Path(context.text), context)


def load_embedded(argument: str, context: LoadContext) -> VQGANDiscretizer:
    """`embedded:digits`. Raises UsageError for another name."""
    return _load(asset(f"{argument}-vqgan.safetensors"), context)


def _load(path: Path, context: LoadContext) -> VQGANDiscretizer:
    vqgan, seen = VQGAN.load_with_provenance(path)
    savings = context.optimizations
    assert savings is None or isinstance(savings, VQGANOptimizations)
    discretizer = VQGANDiscretizer(
        vqgan.to(context.device),
        context.precision,
        savings=savings,
        name=context.text,
        provenance=seen,
        weights_sha256=sha256_file(path),
    )
    discretizer.fit_float16()
    return discretizer
