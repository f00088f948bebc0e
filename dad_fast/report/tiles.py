"""The image sheet of the report: each example as tiles x, Q(x), Q(x + δ), their difference, and a heat map of the codes that changed.

Tiles wrap to the width of the screen, and their labels are text, so that both can be read on a phone.
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

PIECES, SHEET = "sheet.safetensors", "sheet.png"
PAGE_BYTES = 3_000_000  # of all images of a page, as text 4/3 of it
LOSSLESS_SIDE = 64  # larger images are shown as JPEG
HEAT = np.array(
    [(0x6A, 0x12, 0x40), (0xE6, 0x5A, 0x14), (0xFF, 0xE6, 0x5A)], np.float32
)  # near to far; as in report.css


class Tiles:
    """The sheets of one page, within its budget of bytes; `num_sheets` of them share it."""

    def __init__(self, num_sheets: int) -> None:
        self.share = PAGE_BYTES // max(1, num_sheets)

    def sheet(self, folder: Path, problems: list[str]) -> str:
        """HTML of the sheet in a run's folder, "" where it has none; an older run has one picture. Damage is a line in `problems`."""
        if (folder / PIECES).exists():
            try:
                return self._examples(read_pieces(folder / PIECES))
            except DataError as error:
                problems.append(str(error))
        picture = folder / SHEET
        if picture.exists() and picture.stat().st_size <= self.share:
            data = picture.read_bytes()
            if data.startswith(b"\x89PNG"):
                return f'<img alt="picture sheet" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
            problems.append(f"{picture}: not a PNG")
        return ""

    def _examples(self, pieces: Pieces) -> str:
        figures: list[str] = []
        spent = 0
        for i in range(len(pieces.examples)):
            tiles = [(label, encode(image)) for label, image in _tiles(pieces, i)]
            spent += sum(len(data) for _, (_, data) in tiles)
            if figures and spent > self.share:
                break
            figures.append(
                _figure(
                    _caption(pieces, i),
                    tiles,
                    min(pieces.images["original"].shape[1:3]) <= LOSSLESS_SIDE,
                )
            )
        lines = [
            f"The attack is on {pieces.attacked}. Difference: Q(attacked) - Q(clean) around grey, times {pieces.scale}."
        ]
        heat = ""
        if pieces.shift is not None:
            height, width = pieces.shift.shape[1:]
            bits = max(1, (pieces.num_codes - 1).bit_length())
            size = -(-height * width * bits // 8)
            lines.append(
                f"{height} × {width} codes an image out of {pieces.num_codes:,}, {bits} bits each: {size:,} bytes."
            )
            scale = 'near <span class="heat"></span> far; grey: unchanged'
            heat = (
                f"<p>Changed codes, by the distance that they moved in the codebook: {scale}.</p>"
            )
        if len(figures) < len(pieces.examples):
            lines.append(
                f"{len(figures)} of {len(pieces.examples)} examples are shown, to keep the page small."
            )
        return f'<div class="examples">{"".join(figures)}</div><div class="notes">{heat}{notes(lines)}</div>'


def _tiles(pieces: Pieces, i: int) -> list[tuple[str, np.ndarray]]:
    image = {name: part[i] for name, part in pieces.images.items()}
    tiles = [
        ("clean", image["original"]),
        ("Q(clean)", image["discretized"]),
        ("Q(attacked)", image["adversarial"]),
    ]
    tiles.append((f"difference ×{pieces.scale}", image["difference"]))
    if pieces.shift is not None:
        tiles.append(
            (
                "changed codes",
                heat_map(image["original"], pieces.shift[i], float(pieces.shift.max())),
            )
        )
    return tiles


def heat_map(image: np.ndarray, shift: np.ndarray, furthest: float) -> np.ndarray:
    """uint8 [H, W, 3]: `image` (the same) in dim grey, and over it each code of `shift` [h, w] that moved, coloured by how far.

    A code covers its share of the image, without smoothing; `furthest` > 0 is the end of the colours.
    """
    height, width = image.shape[:2]
    rows, columns = (
        np.arange(height) * shift.shape[0] // height,
        np.arange(width) * shift.shape[1] // width,
    )
    moved = shift[rows][:, columns]  # [H, W]
    grey = 40 + 0.5 * image.mean(axis=2)
    at = 2 * np.clip(moved / furthest if furthest > 0 else moved, 0, 1)
    colors = np.stack([np.interp(at, (0, 1, 2), HEAT[:, channel]) for channel in range(3)], axis=-1)
    shown = np.where((moved > 0)[..., None], 0.8 * colors + 0.2 * grey[..., None], grey[..., None])
    return np.clip(shown.round(), 0, 255).astype(np.uint8)


def encode(image: np.ndarray) -> tuple[str, bytes]:
    """(MIME type, bytes) of uint8 [H, W, 3]."""
    file, small = io.BytesIO(), min(image.shape[:2]) <= LOSSLESS_SIDE
    if small:
        Image.fromarray(image).save(file, "PNG", optimize=True)
    else:
        Image.fromarray(image).save(file, "JPEG", quality=88, subsampling=0)
    return "image/png" if small else "image/jpeg", file.getvalue()


def _caption(pieces: Pieces, i: int) -> str:
    example = pieces.examples[i]
    label, answer = text(example.get("label", "")), text(example.get("answer", ""))
    words = (
        f"kept: still {answer}"
        if example.get("kept")
        else f"{'dropped' if example.get('filtered') else 'used'}: now {answer}"
    )
    changed = (
        "" if pieces.shift is None else f" · {(pieces.shift[i] > 0).mean():.0%} of codes changed"
    )
    return f"{label} <small>{words}{changed}</small>"


def _figure(caption: str, tiles: Sequence[tuple[str, tuple[str, bytes]]], small: bool) -> str:
    parts = []
    for label, (mime, data) in tiles:
        source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        image = f'<img{" class=small" if small else ""} alt="{text(label)}" src="{source}">'
        parts.append(f'<div class="tile">{image}<span>{text(label)}</span></div>')
    return f'<figure><figcaption>{caption}</figcaption><div class="tiles">{"".join(parts)}</div></figure>'
