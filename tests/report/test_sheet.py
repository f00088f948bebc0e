"""The picture sheet: pixels, places, and the scale of the difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dad_fast.report import sheet
from dad_fast.report.sheet import difference_scale, write_sheet


def cells(path, count: int, side: int, zoom: int) -> torch.Tensor:
    """Cut the cells out of the sheet: uint8 [blocks * lines, 4, 3, side, side]."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    cell = side * zoom
    block = sheet.CAPTION + 4 * (cell + sheet.GAP)
    blocks = (pixels.shape[2] - sheet.MARGIN) // (block + sheet.MARGIN)
    lines = -(-count // blocks)
    found = []
    for i in range(count):
        top = sheet.HEADER + i % lines * (cell + sheet.GAP)
        left = sheet.MARGIN + i // lines * (block + sheet.MARGIN) + sheet.CAPTION
        corners = range(left, left + block - sheet.CAPTION, cell + sheet.GAP)
        found.append(
            torch.stack([pixels[:, top : top + cell : zoom, x : x + cell : zoom] for x in corners])
        )
    return torch.stack(found)


@pytest.mark.parametrize(
    ("count", "side", "zoom", "blocks"), [(5, 28, 3, 2), (1, 28, 3, 1), (2, 100, 1, 1)]
)
def test_sheet_has_every_image_in_its_cell(tmp_path, count, side, zoom, blocks):
    levels = torch.randint(
        256, (3, count, 3, side, side), generator=torch.Generator().manual_seed(0)
    )
    levels[2] = (levels[1] + torch.randint(-20, 21, levels[1].shape)).clamp(0, 255)
    images = levels / 255
    write_sheet(tmp_path / "sheet.png", *images, captions=["a long name of a class\nkept"] * count)
    found = cells(tmp_path / "sheet.png", count, side, zoom)
    assert found[:, :3].equal(levels.transpose(0, 1).to(torch.uint8))
    scale = difference_scale(images[2] - images[1])
    expected = (0.5 + scale * (images[2] - images[1]) / 2).clamp(0, 1) * 255
    assert (found[:, 3].float() - expected).abs().max() <= 0.51
    assert scale == 10
    assert Image.open(tmp_path / "sheet.png").width == sheet.MARGIN + blocks * (
        sheet.CAPTION + 4 * (side * zoom + sheet.GAP) + sheet.MARGIN
    )


def test_scale_keeps_99_percent_in_range():
    values = torch.linspace(-1, 1, 2001)[None]
    assert [difference_scale(values * size) for size in (1.0, 0.3, 0.015, 1e-9)] == [1, 2, 50, 500]
    assert difference_scale(torch.zeros(1, 10)) == 1


def test_other_types_and_grey_for_no_change(tmp_path):
    image = torch.rand(1, 3, 32, 48).half()
    write_sheet(tmp_path / "sheet.png", image, image, image, [""])
    shown = Image.open(tmp_path / "sheet.png")
    assert shown.getpixel((shown.width - 2 * sheet.MARGIN, sheet.HEADER + 10)) == (128, 128, 128)
