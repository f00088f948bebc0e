"""Picture sheet (PNG): original, Q(original), Q(attacked), and the difference of the last two.

`spread_over_classes` chooses the examples.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dad_fast.files import atomic_write_bytes

# A README shows this many pixels with little shrinking. Narrow examples form several columns.
WIDTH = 920
# Smaller images are enlarged by a whole factor, without smoothing.
MIN_SIDE = 84
CAPTION, GAP, HEADER, MARGIN = 88, 4, 24, 10
SCALES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
# Of the choice of examples: the same images for every run on the same data.
_SEED = 20231101


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose images of as many classes as possible, at random but always the same ones.

    labels: int64 [N]. Returns int64 [min(count, N)], in the order of their labels.
    """
    order = np.random.default_rng(_SEED).permutation(len(labels))
    _, place, sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(place, kind="stable")
    # [N]: how many images of the same class come before an image in `order`.
    turn = np.empty(len(order), np.int64)
    turn[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = order[np.argsort(turn, kind="stable")[:count]]
    return chosen[np.lexsort((chosen, labels[chosen]))]


def write_sheet(
    path: str | Path,
    original: Tensor,
    discretized: Tensor,
    adversarial: Tensor,
    captions: Sequence[str],
) -> None:
    """Write a PNG with one line per example.

    original, discretized, adversarial: x, Q(x), Q(x + δ), [N, 3, H, W] in [0, 1], on any device;
        N ≥ 1
    captions: N texts, such as "four\\nkept"; a line that is too wide is cut

    The change Q(x + δ) - Q(x) is shown around grey, enlarged by one factor for the whole sheet,
    which the heading names.
    """
    difference = adversarial.float() - discretized.float()
    scale = difference_scale(difference)
    columns = [original, discretized, adversarial, 0.5 + scale * difference / 2]
    # The default font of PIL is Latin only, so "x" stands for "×".
    change = f"{scale} x change" if scale > 1 else "change"
    headings = ["original", "Q(original)", "Q(attacked)", change]

    count, side = len(original), max(original.shape[-2:])
    zoom = max(1, -(-MIN_SIDE // side))
    cell_w, cell_h = original.shape[-1] * zoom, original.shape[-2] * zoom
    block = CAPTION + 4 * (cell_w + GAP)
    num_blocks = max(1, min((WIDTH - MARGIN) // (block + MARGIN), count))
    per_block = -(-count // num_blocks)
    size = (MARGIN + num_blocks * (block + MARGIN), HEADER + per_block * (cell_h + GAP) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i in range(count):
        left, line = MARGIN + i // per_block * (block + MARGIN), i % per_block
        top = HEADER + line * (cell_h + GAP)
        text = "\n".join(_fit(part, font) for part in captions[i].split("\n"))
        draw.multiline_text(
            (left, top + cell_h / 2), text, fill="black", font=font, anchor="lm", spacing=3
        )
        for j, images in enumerate(columns):
            x = left + CAPTION + j * (cell_w + GAP)
            if line == 0:
                middle = (x + cell_w / 2, HEADER / 2 + 1)
                draw.text(middle, headings[j], fill="black", font=font, anchor="mm")
            tile = _to_pil(images[i]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, top))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    atomic_write_bytes(path, file.getvalue())


def difference_scale(difference: Tensor) -> int:
    """Return the largest of SCALES that leaves at most 1 % of the values outside [-1, 1]."""
    values = difference.detach().abs().flatten().float().cpu()
    bulk = values.kthvalue(max(1, int(0.99 * len(values)))).values.item()
    if bulk <= 0:
        return 1
    return max((scale for scale in SCALES if scale * bulk <= 1), default=1)


def _to_pil(image: Tensor) -> Image.Image:
    levels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut `text` to the caption's width."""
    if font.getlength(text) <= CAPTION - GAP:
        return text
    while text and font.getlength(text + "...") > CAPTION - GAP:
        text = text[:-1]
    return text + "..."
