"""A frozen VQGAN as a discretizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.base import Discretized, Discretizer, LoadContext
from dad_fast.discretizers.vqgan.float16_range import probe_images, probe_range
from dad_fast.discretizers.vqgan.fused import FusedVQGAN
from dad_fast.discretizers.vqgan.fused_layers import Recipe, VQGANOptimizations
from dad_fast.discretizers.vqgan.gpu_forms import micro_batch_size, norm_maps, upsampling_times
from dad_fast.discretizers.vqgan.layouts import weights_file
from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN
from dad_fast.distributed import process_group as distributed
from dad_fast.errors import DataError
from dad_fast.kernels import CodebookSearch, cases, unpack_codes
from dad_fast.kernels.pack_codes import use_triton
from dad_fast.models.float32 import float32_math
from dad_fast.models.weights.files import asset, fingerprint, sha256_file

Half = Literal["encoder", "decoder"]
HALVES: tuple[Half, Half] = ("encoder", "decoder")
DEFAULT_OPTIMIZATIONS = VQGANOptimizations()


class VQGANDiscretizer(Discretizer):
    """Frozen VQGAN.

    Under `precision.amp` encoder and decoder run fused, each in its own dtype; the lookup is always
    exact.

    The default dtypes are float16 for the encoder, since a code is a rounding decision and bfloat16
    is 9 times as noisy, and bfloat16 for the decoder, since images need no more digits and its
    range needs no scaling.

    Without amp it is the plain model in float32, bit for bit. `optimizations`: those of the fused
    form; None keeps the plain model under autocast. `micro_batch`: images that encoder and decoder
    take at once; 0 = by their size (gpu_forms.py).
    """

    def __init__(
        self,
        vqgan: VQGAN,
        precision: PrecisionConfig,
        *,
        optimizations: VQGANOptimizations | None = DEFAULT_OPTIMIZATIONS,
        name: str = "vqgan",
        provenance: str = "",
        weights_sha256: str | None = None,
        micro_batch: int = 0,
    ) -> None:
        self.vqgan = vqgan.eval().requires_grad_(False)
        self.precision = precision
        self.name = name
        self.provenance = provenance
        self.image_size = vqgan.image_size
        self.weights_sha256 = weights_sha256
        self.micro_batch = micro_batch
        # Parts of a batch are limited in bytes on a GPU, and where a GPU is modelled.
        self.for_gpu = vqgan.codebook.device.type == "cuda"
        if optimizations is None or not precision.amp:
            optimizations = VQGANOptimizations.none()
        self.optimizations = optimizations
        self.scales: dict[Half, float] = {"encoder": 1.0, "decoder": 1.0}
        # Line for the log about the result of fit_float16
        self.range_note = ""
        self._fuse()

    def __call__(self, pixels: Tensor) -> Discretized:
        codes = self.vqgan.lookup(self.encode(pixels))
        return Discretized(self.decode(codes), codes)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode to latents [B, D, h, w] in the precision of the run; float32 is IEEE."""
        size = self._at_once("encoder", len(pixels), *pixels.shape[-2:])
        with float32_math(tf32=False):
            return _in_parts(self.fused.encode, pixels, size)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode `codes` int64 [B, h, w] to images float32 [B, 3, H, W] in [0, 1]."""
        factor = self.vqgan.downsample
        sides = (factor * side for side in codes.shape[-2:])
        size = self._at_once("decoder", len(codes), *sides)
        return _in_parts(self.fused.decode, codes, size).float()

    def _at_once(self, half: Half, batch_size: int, height: int, width: int) -> int:
        """Return how many images of a batch a half takes at once."""
        if self.micro_batch:
            return min(self.micro_batch, batch_size)
        values = self.vqgan.config.largest_map(height, width)
        dtype = self._dtype(half) if self.optimizations.cast else torch.float32
        return micro_batch_size(batch_size, values, dtype.itemsize if self.for_gpu else 0)

    def fit_float16(self, pixels: Tensor | None = None) -> str:
        """Scale the halves that run in float16 so that their activations fit.

        Returns a line for the log, "" if nothing changed.

        The scale is measured on `pixels` [B, 3, H, W], or on synthetic images, with headroom of a
        factor of 8. Call it before training: it runs encoder and decoder in float32 and reads the
        result on the host.
        """
        halves = [half for half in HALVES if self._dtype(half) == torch.float16]
        if not halves:
            return ""
        if pixels is None:
            pixels = probe_images(8 * self.vqgan.downsample, self.vqgan.codebook.device)
        found, lines = probe_range(self.vqgan, pixels), []
        for half in halves:
            scale: float = getattr(found, f"{half}_scale")
            self.scales[half] = scale
            if scale < 1.0:
                layer, largest = max(getattr(found, half).items(), key=lambda item: item[1])
                lines.append(
                    f"{layer} reaches {largest:.3g}: the {half} runs at "
                    f"2^{round(math.log2(scale))} of its scale to fit float16"
                )
        self._fuse()
        self.range_note = "; ".join(lines)
        return self.range_note

    def _fuse(self) -> None:
        self.fused = FusedVQGAN(
            self.vqgan,
            self.optimizations,
            encoder=self._dtype("encoder"),
            decoder=self._dtype("decoder"),
            encoder_scale=self.scales["encoder"],
            decoder_scale=self.scales["decoder"],
        )

    @property
    def kernels(self) -> tuple[str, ...]:  # type: ignore[override]
        is_searched = self.vqgan.config.quantizer != "fsq"
        names = (*([cases.CODEBOOK_SEARCH] if is_searched else []), cases.PACK_CODES)
        # Maps are in NHWC with both alone.
        is_nhwc = self.optimizations.channels_last and self.optimizations.cast
        return (*names, cases.GROUP_NORM_SILU) if is_nhwc else names

    def kernel_cases(self, side: int) -> Iterator[cases.Case]:
        device = self.codebook.device
        search = self.vqgan.search()
        if isinstance(search, CodebookSearch):
            yield cases.codebook_search_case(search)
        yield cases.pack_codes_case(device, self.code_bits, math.prod(self.code_grid(side)))
        if cases.GROUP_NORM_SILU in self.kernels:
            for shape in norm_maps(self.fused, self.vqgan.config, side):
                yield cases.group_norm_silu_case(device, shape)

    def use_kernel(self, name: str, on: bool) -> None:
        if name == cases.GROUP_NORM_SILU:
            self.optimizations = replace(self.optimizations, norm_kernel=on)
            self._fuse()
        elif name == cases.CODEBOOK_SEARCH:
            self.vqgan.search_backend = "auto" if on else "torch"
        elif name == cases.PACK_CODES:
            use_triton(on)

    def time_forms(self, side: int, batch_size: int) -> dict[str, tuple[str, str]]:
        if not self._on_gpu or not self.optimizations.upsample:
            return {}
        size = self._at_once("decoder", batch_size, side, side)
        recipe = Recipe(self.optimizations, self._dtype("decoder"), self.scales["decoder"])
        # All processes take the times of one, so that they compute the same.
        times = upsampling_times(self.vqgan.decoder, recipe, side, size)
        folded, plain = distributed.broadcast(times)
        # The form with fewer FLOP unless the other is clearly faster: a resumed run should not
        # change its rounding by the noise of a timing.
        self.optimizations = replace(self.optimizations, upsample=plain > 0.95 * folded)
        self._fuse()
        value = "folded" if self.optimizations.upsample else "plain"
        reason = f"folded {folded:.2f} ms, plain {plain:.2f} ms for {size} images"
        return {"vqgan_upsample": (value, reason)}

    def _dtype(self, half: Half) -> torch.dtype:
        """Compute dtype of a half; float32 without amp."""
        if not self.precision.amp:
            return torch.float32
        dtype: torch.dtype = getattr(torch, getattr(self.precision, half))
        return dtype

    @property
    def _on_gpu(self) -> bool:
        return self.codebook.device.type == "cuda"

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
        problem = f"{count:,} of the encoder's outputs so far were not finite and got code 0"
        fix = "check the VQGAN's weights"
        if self._dtype("encoder") != torch.float32:
            fix = f"set precision.encoder=float32, or {fix}"
        return [f"{problem}; {fix}"]

    def encoders(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        exact = copy.deepcopy(self.vqgan).double()
        return self.encode, lambda pixels: exact.encode(pixels.double())

    def stages(self) -> list[tuple[object, str, str]]:
        return [
            (self, "encode", "encode"),
            (self, "decode", "decode"),
            (self.vqgan, "lookup", "lookup"),
        ]


def _in_parts(function: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Tensor:
    """Apply `function` to `size` images at once."""
    if size >= len(batch):
        return function(batch)
    return torch.cat([function(part) for part in batch.split(size)])


def load_file(argument: str, context: LoadContext) -> VQGANDiscretizer:
    """Load a VQGAN's .ckpt or .safetensors, or a diffusers folder; the whole name is its path.

    Raises DataError for a file that cannot be used.
    """
    return _load(Path(context.text), context)


def load_embedded(argument: str, context: LoadContext) -> VQGANDiscretizer:
    """Load `embedded:digits`. Raises UsageError for another name."""
    return _load(asset(f"{argument}-vqgan.safetensors"), context)


def _load(path: Path, context: LoadContext) -> VQGANDiscretizer:
    optimizations = context.optimizations
    assert optimizations is None or isinstance(optimizations, VQGANOptimizations)
    if context.shapes_only:
        config, name = PRESETS["f8-16384"], f"{context.text}, not found: VQGAN f8 (16384) assumed"
        if path.exists():
            config, name = _read(path)[0].config, context.text
        with torch.device(context.device):
            vqgan = VQGAN(config)
        discretizer = VQGANDiscretizer(
            vqgan,
            context.precision,
            optimizations=optimizations,
            name=name,
            micro_batch=context.micro_batch,
        )
        discretizer.for_gpu = True
        return discretizer

    vqgan, seen = _read(path)
    discretizer = VQGANDiscretizer(
        vqgan.to(context.device),
        context.precision,
        optimizations=optimizations,
        name=context.text,
        provenance=seen,
        weights_sha256=sha256_file(weights_file(path)),
        micro_batch=context.micro_batch,
    )
    discretizer.fit_float16()
    return discretizer


def _read(path: Path) -> tuple[VQGAN, str]:
    """Return the VQGAN of a file, and its training data. Raises DataError unless it takes RGB."""
    vqgan, seen = VQGAN.load_with_provenance(path)
    channels = vqgan.config.in_channels
    if channels != 3:
        raise DataError(
            f"{path}: a VQGAN for images of {channels} channel{'s' if channels > 1 else ''}; "
            "--discretizer needs one for RGB, of 3 channels"
        )
    return vqgan, seen
