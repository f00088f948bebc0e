"""Configuration of a VQGAN: published ones, or read from a file's metadata or shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from dad_fast.errors import DataError

# Largest and smallest values of settings
MOST = {"ch_mult": 64, "num_res_blocks": 32, "attn_levels": 16, "levels": 256}
LEAST = {"attn_levels": 0, "levels": 2}
# How latents become codes, see `VQGANConfig`
QUANTIZERS = ("nearest", "unit", "fsq")
# Settings that the first files did not have
LATER = ("mid_attention", "quantizer", "levels")


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Shape of a VQGAN.

    `attn_levels`: levels (0 = full resolution) whose blocks are followed by attention.
    `quantizer`: "nearest" entry of the codebook, as in taming; "unit": the same with latents and
    codes of length 1, as in LlamaGen (arXiv 2406.06525); "fsq": finite scalar quantization (arXiv
    2309.15505), each dimension rounded to one of its `levels`; `n_embed` is their product.
    """

    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_levels: tuple[int, ...] = (3,)
    z_channels: int = 4
    embed_dim: int = 4
    n_embed: int = 16384
    # As in taming; a layer with fewer channels has one channel per group
    norm_groups: int = 32
    # Attention between the two middle blocks, as in taming; aMUSEd has none
    mid_attention: bool = True
    quantizer: str = "nearest"
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError, naming the setting, for an impossible shape, such as a file's."""
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer is {str(self.quantizer)[:40]}")
        if not isinstance(self.mid_attention, bool):
            raise ValueError(f"mid_attention is {str(self.mid_attention)[:40]}")
        for field in fields(self):
            if field.name in ("quantizer", "mid_attention"):
                continue
            value = getattr(self, field.name)
            if isinstance(value, tuple) != field.type.startswith("tuple"):
                raise ValueError(f"{field.name} is {str(value)[:40]}")
            values = value if isinstance(value, tuple) else (value,)
            most = MOST.get(field.name, 1 << 20)
            least = LEAST.get(field.name, 1)
            in_range = all(type(number) is int and least <= number <= most for number in values)
            if len(values) > 16 or not in_range:
                raise ValueError(f"{field.name} is {str(value)[:40]}")
        if not self.ch_mult:
            raise ValueError("ch_mult is empty")
        is_fsq = self.quantizer == "fsq"
        shape = (math.prod(self.levels), len(self.levels))
        if is_fsq and (self.n_embed, self.embed_dim) != shape:
            raise ValueError(f"levels {list(self.levels)} make no {self.n_embed} codes")
        if self.levels and not is_fsq:
            raise ValueError(f"levels is {list(self.levels)} without fsq")

    def to_json(self) -> str:
        """Return the text that `config_from_json` parses.

        Later settings are left out at their defaults, so that earlier versions read the files of
        what they can build.
        """
        values = asdict(self)
        for field in fields(self):
            if field.name in LATER and values[field.name] == field.default:
                del values[field.name]
        return json.dumps(values)

    @property
    def downsample(self) -> int:
        """Side in pixels of the square that one code represents."""
        return 2 ** (len(self.ch_mult) - 1)

    def largest_map(self, height: int, width: int) -> int:
        """Bound the number of values, per image, of the largest map of encoder and decoder."""
        widths = [self.ch * mult for mult in self.ch_mult]
        sizes = []
        for level in range(len(widths)):
            # A level has the maps of its neighbours at its borders. Downsampling pads by 1.
            channels = max(widths[max(0, level - 1) : level + 2])
            sizes.append(channels * ((height >> level) + 1) * ((width >> level) + 1))
        return max(sizes)

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return max(1, (self.n_embed - 1).bit_length())


def _f16(n_embed: int) -> VQGANConfig:
    return VQGANConfig(
        ch_mult=(1, 1, 2, 2, 4), attn_levels=(4,), z_channels=256, embed_dim=256, n_embed=n_embed
    )


PRESETS: dict[str, VQGANConfig] = {
    "f8-256": VQGANConfig(n_embed=256),
    "f8-16384": VQGANConfig(n_embed=16384),
    "f16-1024": _f16(1024),
    "f16-16384": _f16(16384),
}


def _llamagen(*ch_mult: int) -> VQGANConfig:
    return VQGANConfig(
        ch_mult=ch_mult,
        attn_levels=(len(ch_mult) - 1,),
        z_channels=256,
        embed_dim=8,
        n_embed=16384,
        quantizer="unit",
    )


# Published in other layouts (layouts.py)
OTHER_LAYOUTS: dict[str, VQGANConfig] = {
    "llamagen-f8": _llamagen(1, 2, 2, 4),
    "llamagen-f16": _llamagen(1, 1, 2, 2, 4),
    "ldm-f4-8192": VQGANConfig(
        ch_mult=(1, 2, 4), attn_levels=(), z_channels=3, embed_dim=3, n_embed=8192
    ),
    "amused-f16-8192": VQGANConfig(
        ch_mult=(1, 2, 2, 4, 6),
        attn_levels=(),
        z_channels=64,
        embed_dim=64,
        n_embed=8192,
        mid_attention=False,
    ),
}


def config_from_json(text: str, path: str | Path) -> VQGANConfig:
    """Parse the metadata that `VQGAN.save` wrote.

    Raises DataError, naming `path`, if it is damaged.
    """
    known = {field.name for field in fields(VQGANConfig)}
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in json.loads(text).items()
        }
    except (ValueError, AttributeError, RecursionError):
        raise DataError(
            f"{path}: its metadata dad_fast.vqgan is not a JSON object; write the file again with "
            "VQGAN.save"
        ) from None
    unknown = sorted(values.keys() - known)
    if unknown:
        raise DataError(
            f"{path}: unknown VQGAN setting {unknown[0]!r} in its metadata; it was written by "
            "another version of dad-fast"
        )
    try:
        return VQGANConfig(**values)
    except ValueError as error:
        raise DataError(
            f"{path}: its metadata describes no possible VQGAN ({error}); is the file damaged?"
        ) from None


def infer_config(state: Mapping[str, Tensor], path: str | Path) -> VQGANConfig:
    """Infer the config of a taming state dict from its keys and shapes.

    Raises DataError, naming `path`, if it is not a VQGAN.
    """
    if "quantize.embed.weight" in state:
        raise DataError(
            f"{path}: this is a Gumbel VQGAN, which has another quantizer; use one with "
            "quantize.embedding.weight"
        )
    try:
        ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
        num_levels = 1 + max(
            int(key.split(".")[2]) for key in state if key.startswith("encoder.down.")
        )
        num_blocks = 1 + max(
            int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block.")
        )
        n_embed, embed_dim = state["quantize.embedding.weight"].shape
        return VQGANConfig(
            in_channels=in_channels,
            ch=ch,
            ch_mult=tuple(
                state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch
                for i in range(num_levels)
            ),
            num_res_blocks=num_blocks,
            attn_levels=tuple(
                i for i in range(num_levels) if f"encoder.down.{i}.attn.0.q.weight" in state
            ),
            z_channels=state["decoder.conv_in.weight"].shape[1],
            embed_dim=embed_dim,
            n_embed=n_embed,
            mid_attention="encoder.mid.attn_1.q.weight" in state,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise DataError(
            f"{path}: not a VQGAN with taming-transformers' keys (no encoder.*, decoder.* and "
            "quantize.embedding.weight); "
            "--discretizer needs such a checkpoint"
        ) from None
