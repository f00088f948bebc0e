"""Picture of stored samples: clean, as stored and as decoded from codes, each with its caption."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dad_fast.files import atomic_write_bytes

WIDTH, MIN_SIDE, CAPTION, GAP, HEADER, MARGIN = 1000, 84, 140, 4, 24, 12


def draw_sheet(
    path: str | Path, columns: Mapping[str, np.ndarray], captions: Sequence[str]
) -> None:
    """Write a PNG of N >= 1 samples; small images are enlarged by a whole factor.

    columns: heading -> uint8 [N, H, W, 3]. captions: N texts.
    """
    count = len(captions)
    height, width = next(iter(columns.values())).shape[1:3]
    zoom = max(1, -(-MIN_SIDE // max(height, width)))
    cell_w, cell_h = width * zoom, height * zoom
    block = CAPTION + len(columns) * (cell_w + GAP)
    num_blocks = min(max(1, WIDTH // (block + MARGIN)), count)
    lines = -(-count // num_blocks)
    sheet = Image.new(
        "RGB",
        (MARGIN + num_blocks * (block + MARGIN), HEADER + lines * (cell_h + GAP) + MARGIN),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i in range(count):
        left = MARGIN + i // lines * (block + MARGIN)
        top = HEADER + i % lines * (cell_h + GAP)
        text = "\n".join(_fit(line, font) for line in captions[i].split("\n"))
        draw.multiline_text(
            (left, top + cell_h / 2), text, fill="black", font=font, anchor="lm", spacing=3
        )
        for j, (heading, images) in enumerate(columns.items()):
            x = left + CAPTION + j * (cell_w + GAP)
            if i % lines == 0:
                draw.text(
                    (x + cell_w / 2, HEADER / 2 + 1), heading, fill="black", font=font, anchor="mm"
                )
            cell = Image.fromarray(images[i]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(cell, (x, top))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    atomic_write_bytes(path, file.getvalue())


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut `text` to the caption's width."""
    while text and font.getlength(text) > CAPTION - GAP:
        text = text.removesuffix("...")[:-1] + "..." if text != "..." else ""
    return text
