"""Table of discretizers for the docs: codes, FLOP, origin of the weights, licence.

    python -m dad_fast.discretizers.overview          # print it
    python -m dad_fast.discretizers.overview --write  # into docs/discretizers.md of a checkout

Built-in names come from the registry and configurations from `vqgan/config.py`; codes and FLOP are
computed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.registry import DISCRETIZERS, load_discretizer
from dad_fast.discretizers.vqgan.config import OTHER_LAYOUTS, PRESETS, VQGANConfig
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs" / "discretizers.md"
START, END = "<!-- discretizers -->\n", "<!-- end -->"
SIDE, DIGITS = 224, 28
TAMING = "CompVis/taming-transformers and CompVis/latent-diffusion"
LLAMAGEN = "FoundationVision/LlamaGen"
MIT = "MIT (the repository's)"


class Origin(NamedTuple):
    """A row of the table: what to write after --discretizer, and where the weights come from."""

    example: str
    weights: str
    licence: str


# Name in the registry -> origin
BUILT_IN = {
    "embedded": Origin("embedded:digits", "in the package", "that of this project"),
    "identity": Origin("identity", "none", "–"),
    "jpeg": Origin("jpeg:75", "none", "–"),
    "webp": Origin("webp:75", "none", "–"),
    "blur": Origin("blur:4", "none", "–"),
}
# Name of a configuration -> origin
PUBLISHED = {
    "f8-256": Origin("FILE.ckpt", f"{TAMING}: VQGAN OpenImages f8, 256", MIT),
    "f8-16384": Origin("FILE.ckpt", f"{TAMING}: VQGAN OpenImages f8, 16384", MIT),
    "f16-1024": Origin("FILE.ckpt", "CompVis/taming-transformers: VQGAN ImageNet f16, 1024", MIT),
    "f16-16384": Origin("FILE.ckpt", "CompVis/taming-transformers: VQGAN ImageNet f16, 16384", MIT),
    "ldm-f4-8192": Origin(
        "FOLDER", "CompVis/ldm-celebahq-256: vqvae (diffusers)", "Apache-2.0 (model card)"
    ),
    "amused-f16-8192": Origin(
        "FOLDER", "amused/amused-256: vqvae (diffusers)", "OpenRAIL++ (model card)"
    ),
    "llamagen-f8": Origin("vq_ds8_c2i.pt", LLAMAGEN, "MIT (the repository's; parts have others)"),
    "llamagen-f16": Origin("vq_ds16_c2i.pt", LLAMAGEN, "MIT (the repository's; parts have others)"),
}
OWN = Origin("FILE.safetensors", "yours: dad-fast fit-discretizer", "yours")
# The default of `dad-fast fit-discretizer`, and an FSQ of about as many codes
FITTED = {
    "fitted f4, 1,024 codes": VQGANConfig(
        ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, attn_levels=(), n_embed=1024, norm_groups=8
    ),
    "fitted f4, FSQ 8,5,5,5": VQGANConfig(
        ch=32,
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        attn_levels=(),
        n_embed=1000,
        norm_groups=8,
        quantizer="fsq",
        levels=(8, 5, 5, 5),
    ),
}


def markdown() -> str:
    """Return the table. Raises UsageError for a built-in discretizer without an origin."""
    head = "| discretizer | `--discretizer` | codes per image | GFLOP | weights | licence |"
    return "\n".join([head, "|---|---|---|---|---|---|", *_rows()])


def with_table(page: str) -> str:
    """Return the text of docs/discretizers.md with its table made anew."""
    pattern = re.escape(START) + ".*?" + re.escape(END)
    page, count = re.subn(pattern, f"{START}\n{markdown()}\n\n{END}", page, flags=re.S)
    if count != 1:
        raise UsageError(f"{PAGE.name} has {count} places for the table of discretizers, not 1")
    return page


def _rows() -> Iterator[str]:
    for name, config in {**PRESETS, **OTHER_LAYOUTS}.items():
        yield _vqgan_row(f"VQGAN {name}", PUBLISHED[name], config)
    for name, config in FITTED.items():
        yield _vqgan_row(name, OWN, config)
    yield from built_in_rows()


def built_in_rows() -> Iterator[str]:
    """Yield a row for each built-in discretizer of the registry."""
    for name in DISCRETIZERS.own_names():
        if name not in BUILT_IN:
            raise UsageError(f"--discretizer {name}: has no origin in {__name__}")
        origin = BUILT_IN[name]
        found = load_discretizer(origin.example, PrecisionConfig(), torch.device("cpu"))
        side = DIGITS if found.code_bits else SIDE
        with FlopCounterMode(display=False) as counter:
            found(torch.zeros(1, 3, side, side))
        yield _row(name, origin, found.describe_codes(side), counter.get_total_flops())


def _vqgan_row(name: str, origin: Origin, config: VQGANConfig) -> str:
    """Return the row of a VQGAN, with the FLOP of a pass without the search."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vqgan = VQGAN(config)
        latents = vqgan.encode(torch.empty(1, 3, SIDE, SIDE))
        vqgan.decode(torch.empty(1, *latents.shape[2:], dtype=torch.int64))
    height, width = latents.shape[2:]
    codes = f"{height}x{width} codes of {config.code_bits} bits"
    return _row(name, origin, codes, counter.get_total_flops())


def _row(name: str, origin: Origin, codes: str, flop: int) -> str:
    cells = [
        name,
        f"`{origin.example}`",
        codes.removesuffix(" per image"),
        f"{flop / 1e9:,.3g}",
        origin.weights,
        origin.licence,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(markdown())
    if "--write" in sys.argv[1:]:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
