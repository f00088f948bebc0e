"""Image sheet of the report: x, Q(x), Q(x + δ), their difference, and a heat map of changed codes.

Tiles wrap to the width of the screen and their labels are text, so that the sheet reads on a phone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dad_fast.errors import DataError
from dad_fast.report.markup import notes, text
from dad_fast.report.pieces import Pieces, read_pieces

PIECES = "sheet.safetensors"
# Of all images of a page; base64 makes them 4/3 as long.
PAGE_BYTES = 3_000_000
# Larger images are shown as JPEG.
LOSSLESS_SIDE = 64
# Near to far; the same colours as in report.css.
HEAT = np.array([(0x6A, 0x12, 0x40), (0xE6, 0x5A, 0x14), (0xFF, 0xE6, 0x5A)], np.float32)


class Tiles:
    """Picture sheets of one page, which share its budget of bytes."""

    def __init__(self, num_sheets: int) -> None:
        self.share = PAGE_BYTES // max(1, num_sheets)

    def sheet(self, folder: Path, problems: list[str]) -> str:
        """Return the HTML of the sheet in a run's folder, "" if it has none.

        A damaged sheet is left out and becomes a line in `problems`.
        """
        if not (folder / PIECES).exists():
            return ""
        try:
            return self._examples(read_pieces(folder / PIECES))
        except DataError as error:
            problems.append(str(error))
            return ""

    def _examples(self, pieces: Pieces) -> str:
        small = min(pieces.images["original"].shape[1:3]) <= LOSSLESS_SIDE
        figures: list[str] = []
        spent = 0
        for i in range(len(pieces.examples)):
            tiles = [(label, encode(image)) for label, image in _tiles(pieces, i)]
            spent += sum(len(data) for _, (_, data) in tiles)
            if figures and spent > self.share:
                break
            figures.append(_figure(_caption(pieces, i), tiles, small))

        lines = [
            f"The attack is on {pieces.attacked}. Difference: Q(attacked) - Q(clean) around grey, "
            f"times {pieces.scale}."
        ]
        heat = ""
        if pieces.shift is not None:
            height, width = pieces.shift.shape[1:]
            bits = max(1, (pieces.num_codes - 1).bit_length())
            size = -(-height * width * bits // 8)
            lines.append(
                f"{height} × {width} codes an image out of {pieces.num_codes:,}, "
                f"{bits} bits each: {size:,} bytes."
            )
            scale = 'near <span class="heat"></span> far; grey: unchanged'
            heat = f"<p>Changed codes, coloured by their distance in the codebook: {scale}.</p>"
        if len(figures) < len(pieces.examples):
            lines.append(
                f"{len(figures)} of {len(pieces.examples)} examples are shown, "
                "to keep the page small."
            )
        examples = f'<div class="examples">{"".join(figures)}</div>'
        return f'{examples}<div class="notes">{heat}{notes(lines)}</div>'


def _tiles(pieces: Pieces, i: int) -> list[tuple[str, np.ndarray]]:
    image = {name: part[i] for name, part in pieces.images.items()}
    tiles = [
        ("clean", image["original"]),
        ("Q(clean)", image["discretized"]),
        ("Q(attacked)", image["adversarial"]),
        (f"difference ×{pieces.scale}", image["difference"]),
    ]
    if pieces.shift is not None:
        heat = heat_map(image["original"], pieces.shift[i], float(pieces.shift.max()))
        tiles.append(("changed codes", heat))
    return tiles


def heat_map(image: np.ndarray, shift: np.ndarray, furthest: float) -> np.ndarray:
    """Return `image` (uint8 [H, W, 3]) in dim grey, with changed codes coloured by their distance.

    shift: [h, w], 0 for an unchanged code. A code covers its share of the image, without smoothing.
    furthest: the distance at the end of the colour scale.
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * shift.shape[0] // height
    columns = np.arange(width) * shift.shape[1] // width
    moved = shift[rows][:, columns]  # [H, W]
    grey = 40 + 0.5 * image.mean(axis=2)
    at = 2 * np.clip(moved / furthest if furthest > 0 else moved, 0, 1)
    colors = np.stack([np.interp(at, (0, 1, 2), HEAT[:, channel]) for channel in range(3)], axis=-1)
    shown = np.where((moved > 0)[..., None], 0.8 * colors + 0.2 * grey[..., None], grey[..., None])
    return np.clip(shown.round(), 0, 255).astype(np.uint8)


def encode(image: np.ndarray) -> tuple[str, bytes]:
    """Encode uint8 [H, W, 3]; return (MIME type, bytes)."""
    file, small = io.BytesIO(), min(image.shape[:2]) <= LOSSLESS_SIDE
    if small:
        Image.fromarray(image).save(file, "PNG", optimize=True)
    else:
        Image.fromarray(image).save(file, "JPEG", quality=88, subsampling=0)
    return "image/png" if small else "image/jpeg", file.getvalue()


def _caption(pieces: Pieces, i: int) -> str:
    example = pieces.examples[i]
    label, answer = text(example.get("label", "")), text(example.get("answer", ""))
    if example.get("kept"):
        words = f"kept: still {answer}"
    elif example.get("filtered"):
        words = f"dropped: now {answer}"
    else:
        words = f"used: now {answer}"
    if pieces.shift is not None:
        words += f" · {(pieces.shift[i] > 0).mean():.0%} of codes changed"
    return f"{label} <small>{words}</small>"


def _figure(caption: str, tiles: Sequence[tuple[str, tuple[str, bytes]]], small: bool) -> str:
    parts = []
    for label, (mime, data) in tiles:
        source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        image = f'<img{" class=small" if small else ""} alt="{text(label)}" src="{source}">'
        parts.append(f'<div class="tile">{image}<span>{text(label)}</span></div>')
    tiles_box = f'<div class="tiles">{"".join(parts)}</div>'
    return f"<figure><figcaption>{caption}</figcaption>{tiles_box}</figure>"
