"""VQGANs in other layouts than taming-transformers': diffusers' `VQModel` and LlamaGen's VQ.

Both are taming's encoder and decoder under other names, so their keys are renamed. Diffusers counts
the decoder's levels from the coarsest and projects attention by linear layers; LlamaGen's codes and
latents have length 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dad_fast.discretizers.vqgan.config import VQGANConfig, infer_config
from dad_fast.errors import DataError
from dad_fast.files import read_text

CODEBOOK = "quantize.embedding.weight"
UP = "decoder.up."
# Of diffusers, each also with attention, as "AttnDownEncoderBlock2D"
BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
# Names of a diffusers model's weights in its folder, the first that exists
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)

DIFFUSERS = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.", ".down."),
    (r"\.up_blocks\.", ".up."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    # Of attention: today's names and those before diffusers 0.15
    (r"\.(to_q|query)\.", ".q."),
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
)
LLAMAGEN = (
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"\.res\.", ".block."),
)


def weights_file(path: str | Path) -> Path:
    """Return `path`, or the weights in a folder of a diffusers `VQModel`.

    Raises DataError for a folder without weights.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    inside = next((child.name for child in sorted(path.glob("vq*")) if child.is_dir()), "")
    hint = f"; name its folder {path / inside}" if inside else ""
    raise DataError(f"{path}: this folder has no {WEIGHTS[0]}, so it is no diffusers VQModel{hint}")


def to_taming(
    state: Mapping[str, Tensor], path: str | Path
) -> tuple[dict[str, Tensor], VQGANConfig]:
    """Return a state dict of any layout under taming's names, and its configuration.

    That of diffusers comes from the config.json beside `path`, or like any other from the shapes.
    Raises DataError, naming `path`, for another model.
    """
    if any(key.startswith("encoder.conv_blocks.") for key in state):
        state = _renamed(state, LLAMAGEN, path)
        if CODEBOOK in state:
            state[CODEBOOK] = F.normalize(state[CODEBOOK].float(), dim=-1)
        return state, replace(infer_config(state, path), quantizer="unit")
    if not any(key.startswith("encoder.down_blocks.") for key in state):
        return dict(state), infer_config(state, path)

    state = _renamed(state, DIFFUSERS, path)
    for key, value in state.items():
        if re.search(r"\.(q|k|v|proj_out)\.weight$", key) and value.ndim == 2:
            state[key] = value[:, :, None, None]
    file = Path(path).with_name("config.json")
    config = _from_diffusers(file) if file.is_file() else infer_config(state, path)
    return state, config


def _renamed(
    state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...], path: str | Path
) -> dict[str, Tensor]:
    """Apply `rules` to every key, and count the decoder's levels from the finest."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        is_odd = key.startswith(UP) and not re.match(r"\d{1,3}\.", key.removeprefix(UP))
        if key in renamed or is_odd:
            raise DataError(f"{path}: its entry {key[:60]} is no layer; is the file damaged?")
        renamed[key] = value
    top = max((int(key.split(".")[2]) for key in renamed if key.startswith(UP)), default=0)
    flipped = {}
    for key, value in renamed.items():
        if key.startswith(UP):
            level, _, rest = key.removeprefix(UP).partition(".")
            key = f"{UP}{top - int(level)}.{rest}"
        flipped[key] = value
    return flipped


def _from_diffusers(file: Path) -> VQGANConfig:
    """Read the config.json of a `VQModel`.

    Raises DataError for another model, or a form of it that this project's VQGAN is not.
    """
    try:
        values: dict[str, Any] = json.loads(read_text(file))
        kind = values["_class_name"]
        if kind != "VQModel":
            raise DataError(f"{file}: describes a {str(kind)[:40]}, not a VQModel with codes")
        for key, wanted in (("act_fn", "silu"), ("norm_type", "group")):
            found = values.get(key, wanted)
            if found != wanted:
                raise DataError(
                    f"{file}: {key} is {str(found)[:40]}; only a VQModel with {wanted} can be used"
                )
        widths = values["block_out_channels"]
        if any(width % widths[0] for width in widths):
            raise DataError(
                f"{file}: block_out_channels {widths} are no multiples of their first; such a "
                "VQModel cannot be used"
            )
        blocks = values["down_block_types"]
        # Others have the same keys, and pad or normalize otherwise.
        for name in [*blocks, *values["up_block_types"]]:
            if name.removeprefix("Attn") not in BLOCKS:
                raise DataError(
                    f"{file}: has a {str(name)[:40]}; only a VQModel of DownEncoderBlock2D and "
                    "UpDecoderBlock2D can be used"
                )
        return VQGANConfig(
            in_channels=values["in_channels"],
            ch=widths[0],
            ch_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=values["layers_per_block"],
            attn_levels=tuple(i for i, name in enumerate(blocks) if name.startswith("Attn")),
            z_channels=values["latent_channels"],
            embed_dim=values.get("vq_embed_dim") or values["latent_channels"],
            n_embed=values["num_vq_embeddings"],
            norm_groups=values.get("norm_num_groups", 32),
            mid_attention=values.get("mid_block_add_attention", True),
        )
    except KeyError as error:
        raise DataError(f"{file}: has no {error.args[0]}, so it describes no VQModel") from None
    except (
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as error:
        why = " ".join(str(error).split())[:100]
        raise DataError(f"{file}: describes no possible VQModel ({why})") from None
