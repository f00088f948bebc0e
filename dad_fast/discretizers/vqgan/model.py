"""VQGAN (Esser et al., "Taming Transformers", arXiv 2012.09841): pixels -> codes -> pixels.

Module names are those of taming-transformers' checkpoints (`encoder.*`, `decoder.*`,
`quantize.embedding.weight`, `quant_conv`, `post_quant_conv`), so a published checkpoint loads
strictly; those of diffusers and LlamaGen are renamed (layouts.py). Pixels are in [0, 1] outside and
in [-1, 1] inside. The lookup is `dad_fast.kernels.nearest_code`: exact, without an N x K matrix of
distances.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.discretizers.vqgan.config import PRESETS as PRESETS
from dad_fast.discretizers.vqgan.config import VQGANConfig, config_from_json
from dad_fast.discretizers.vqgan.fsq import FSQSearch, fsq_codebook, fsq_codes
from dad_fast.discretizers.vqgan.layouts import CODEBOOK, to_taming, weights_file
from dad_fast.errors import DataError, UsageError
from dad_fast.kernels import CodebookSearch, nearest_code
from dad_fast.models.weights.files import load_strictly, read_state_dict, write_safetensors
from dad_fast.models.weights.unwrap import unwrap

# Metadata: the side in pixels of the training images
IMAGE_SIZE = "dad_fast.img_size"


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(groups, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        maps = [conv(h) for conv in (self.q, self.k, self.v)]
        # [B, C, H, W] -> [B, 1, HW, C]
        q, k, v = (each.flatten(2).transpose(1, 2).unsqueeze(1) for each in maps)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Pad right and bottom only, as the published weights were trained.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, each followed by attention if the level has it."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, groups: int
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(out_channels if i else in_channels, out_channels, groups)
            for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, groups) for _ in range(num_blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups) if attention else None
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        return self.block_2(x if self.attn_1 is None else self.attn_1(x))


class Encoder(nn.Module):
    def __init__(self, cfg: VQGANConfig) -> None:
        super().__init__()
        widths = [cfg.ch * mult for mult in cfg.ch_mult]
        self.conv_in = nn.Conv2d(cfg.in_channels, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([cfg.ch, *widths], widths, strict=False)):
            level = Level(before, width, cfg.num_res_blocks, i in cfg.attn_levels, cfg.norm_groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], cfg.norm_groups, cfg.mid_attention)
        self.norm_out = _norm(widths[-1], cfg.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i < len(self.down) - 1:
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Decoder, from the coarsest level to the finest; `up[i]` mirrors the encoder's `down[i]`."""

    def __init__(self, cfg: VQGANConfig) -> None:
        super().__init__()
        widths = [cfg.ch * mult for mult in cfg.ch_mult]
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], cfg.norm_groups, cfg.mid_attention)
        self.up = nn.ModuleList()
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = Level(
                before, width, cfg.num_res_blocks + 1, i in cfg.attn_levels, cfg.norm_groups
            )
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0], cfg.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], cfg.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)
            if i > 0:
                x = self.up[i].upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantize(nn.Module):
    """Codebook [K, D] under taming's name; that of FSQ is fixed."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        num_codes = config.n_embed
        self.embedding = nn.Embedding(num_codes, config.embed_dim)
        weight = self.embedding.weight
        nn.init.uniform_(weight, -1.0 / num_codes, 1.0 / num_codes)
        if config.quantizer == "unit":
            weight.data = F.normalize(weight.data, dim=-1)
        elif config.quantizer == "fsq":
            weight.data = fsq_codebook(config.levels, weight.device)
            weight.requires_grad_(False)


class VQGAN(nn.Module):
    """Autoencoder and codebook (taming-transformers, arXiv 2012.09841).

    Pixels are float32 [B, 3, H, W] in [0, 1], codes int64 [B, h, w] with h = H / factor.

    `encode` and `decode` are differentiable (codes are not); a discretizer runs them frozen. See
    `load` for files and `FusedVQGAN` for faster inference.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantize(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        # Side in pixels of the training images; 0 if it is not known
        self.image_size = 0
        # Back end of the search, by name
        self.search_backend = "auto"
        self._search: CodebookSearch | FSQSearch | None = None
        # Identity of the codebook that _search was prepared for
        self._searched: tuple[object, ...] = ()

    @property
    def downsample(self) -> int:
        """Side in pixels of the square that one code represents."""
        return self.config.downsample

    @property
    def codebook(self) -> Tensor:
        """Codebook [K, D]."""
        return self.quantize.embedding.weight

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode `pixels` [B, 3, H, W] in [0, 1] to latents [B, D, H/f, W/f].

        Raises UsageError unless f divides both sides.
        """
        self.check_sides(pixels)
        return self.quant_conv(self.encoder(2.0 * pixels - 1.0))

    def check_sides(self, pixels: Tensor) -> None:
        """Raise UsageError unless the factor divides both sides of `pixels` [B, 3, H, W]."""
        height, width = pixels.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise UsageError(
                f"images of {height}x{width} do not divide into this discretizer's "
                f"{self.downsample}x{self.downsample} codes: "
                f"choose an --img-size that is a multiple of {self.downsample}"
            )

    def lookup(self, latents: Tensor) -> Tensor:
        """Return codes int64 [B, h, w] of `latents` [B, D, h, w].

        A code is the exact nearest entry of the fp32 codebook, the lowest index on ties; with the
        quantizer "unit", to the latent divided by its length in fp32. With "fsq" it is the exact
        rounding of each dimension (fsq.py).

        A frozen codebook is prepared at the first call (`CodebookSearch`), and again after it was
        changed or moved.
        """
        codebook = self.codebook.detach()
        with torch.autocast(latents.device.type, enabled=False):
            # A fake tensor has no values to prepare a search from.
            is_traced = torch.compiler.is_compiling() or type(latents) is not Tensor
            latents = self.to_search(latents.detach())
            if is_traced or self.codebook.requires_grad or codebook.is_inference():
                if self.config.quantizer == "fsq":
                    return fsq_codes(latents, self.config.levels)
                return nearest_code(latents, codebook.float())
            return self.search().search(latents)

    def to_search(self, latents: Tensor) -> Tensor:
        """Return `latents` [B, D, h, w] in float32, of length 1 where the codes are."""
        latents = latents.float()
        return F.normalize(latents, dim=1) if self.config.quantizer == "unit" else latents

    def search(self) -> CodebookSearch | FSQSearch:
        """Return the prepared search of the current codebook.

        Preparing it resets its `num_nonfinite` to 0.
        """
        codebook = self.codebook.detach()
        # In-place changes increase the version; `.to()` and loading with assign=True make another
        # tensor. Writes through `.data` change none of these: on the CPU the values are compared,
        # which is cheap; on a GPU it would synchronize.
        now = (
            self.codebook._version,
            codebook.data_ptr(),
            codebook.device,
            codebook.dtype,
            self.search_backend,
        )
        changed = now != self._searched
        if self._search is not None and not changed and codebook.device.type == "cpu":
            before, after = (
                values.float().contiguous().view(torch.int32).numpy()
                for values in (self._search.codebook, codebook)
            )
            # Not torch.equal, which the test of host syncs would count as one.
            changed = not np.array_equal(before, after)
        if self._search is None or changed:
            if self.config.quantizer == "fsq":
                self._search = FSQSearch(codebook, self.config.levels)
            else:
                self._search = CodebookSearch(codebook, self.search_backend)
            self._searched = now
        return self._search

    def codes(self, pixels: Tensor) -> Tensor:
        """Encode `pixels` [B, 3, H, W] in [0, 1] to codes int64 [B, H/f, W/f]."""
        return self.lookup(self.encode(pixels))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode `codes` int64 [B, h, w] to pixels [B, 3, h*f, w*f] in [0, 1]."""
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2)  # [B, D, h, w]
        return (self.decoder(self.post_quant_conv(quantized)).clamp(-1.0, 1.0) + 1.0) / 2.0

    def save(self, path: str | Path, seen: str) -> None:
        """Write a safetensors file with the configuration; `seen` names the training data."""
        state = self.state_dict()
        if self.config.quantizer == "fsq":
            del state[CODEBOOK]
        metadata = {"dad_fast.vqgan": self.config.to_json(), "dad_fast.seen": seen}
        if self.image_size:
            metadata[IMAGE_SIZE] = str(self.image_size)
        write_safetensors(path, state, metadata)

    @classmethod
    def load(cls, path: str | Path) -> VQGAN:
        """Load taming's Lightning `.ckpt`, a bare state dict or safetensors, also in the layouts of
        diffusers (or its folder) and LlamaGen.

        Strips wrappers and drops what belongs to training, see `unwrap`. Raises DataError unless
        every other key matches.
        """
        return cls.load_with_provenance(path)[0]

    @classmethod
    def load_with_provenance(cls, path: str | Path) -> tuple[VQGAN, str]:
        """Return the VQGAN of `load`, and its training data as the file records it."""
        path = weights_file(path)
        state, metadata = read_state_dict(path)
        state = unwrap(state, path)
        if "dad_fast.vqgan" in metadata:
            config = config_from_json(metadata["dad_fast.vqgan"], path)
        else:
            state, config = to_taming(state, path)
        if config.quantizer == "fsq":
            state[CODEBOOK] = fsq_codebook(config.levels)
        try:
            # No random weights, which the file's would replace
            with torch.device("meta"):
                model = cls(config)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise DataError(
                f"{path}: no VQGAN can be made of {config} ({error}); is the file damaged?"
            ) from None
        load_strictly(model, state, path)
        recorded = metadata.get(IMAGE_SIZE, "")
        if re.fullmatch(r"[0-9]{1,5}", recorded):
            model.image_size = int(recorded)
        return model, metadata.get("dad_fast.seen", "not recorded in the weights")
