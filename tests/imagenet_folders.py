"""Test sets of ImageNet's classes in their true layouts, with a few tiny images.

An image's colour encodes its class: a model that reads the colour is right exactly where folder, label
and output are joined correctly.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Five descriptions from ObjectNet's own file, with several ids and with names of several words.
OBJECTNET = {
    "alarm_clock": ("Alarm clock", "analog clock; digital clock", [409, 530]),
    "backpack": ("Backpack", "backpack, back pack, knapsack, packsack, rucksack, haversack", [414]),
    "banana": ("Banana", "banana", [954]),
    "coffee_french_press": ("Coffee/French press", "espresso maker", [550]),
    "pen": (
        "Pen",
        "ballpoint, ballpoint pen, ballpen, Biro; quill, quill pen; fountain pen",
        [418, 749, 563],
    ),
}


def wnids() -> list[str]:
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_names())


def write_image(path: Path, number: int, noise: int = 0, side: int = 8, border: int = 0) -> None:
    """Make a flat picture that encodes `number`, 0 … 1023, in red and green, noise in blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((side + 2 * border, side + 2 * border, 3), np.uint8)
    pixels[..., 0] = 255 if border else 0  # ObjectNet's red line
    inner = slice(border, side + border)
    pixels[inner, inner] = (number // 32 * 8, number % 32 * 8, noise)
    Image.fromarray(pixels).save(
        path, "PNG"
    )  # by its content, whatever its name; JPEG would smear the colours


def write_classes(
    root: Path, folders: dict[str, int], each: int = 1, suffix: str = ".JPEG", **options
) -> Path:
    """Write root/FOLDER/i.JPEG, all of a folder with the colour of its number."""
    for folder, number in folders.items():
        for i in range(each):
            write_image(root / folder / f"{folder}_{i}{suffix}", number, **options)
    return root


def write_objectnet(root: Path, each: int = 2) -> Path:
    """Write images/ with more classes than ImageNet, mappings/, and red borders."""
    write_classes(
        root / "images",
        {name: ids[i % len(ids)] for i, (name, (_, _, ids)) in enumerate(OBJECTNET.items())},
        each,
        ".png",
        border=2,
    )
    write_classes(root / "images", {"figurine": 1, "chess_piece": 2}, 1, ".png", border=2)
    (root / "mappings").mkdir()
    labels = {folder: label for folder, (label, _, _) in OBJECTNET.items()} | {
        "figurine": "Figurine",
        "chess_piece": "Chess piece",
    }
    (root / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(
        json.dumps({label: text for label, text, _ in OBJECTNET.values()})
    )
    return root


def colour_number(pixels: Tensor) -> Tensor:
    """Read the number of each image, int64 [B], also at the corners, to notice a border."""
    levels = (pixels * 255 / 8).round().long()
    return levels[:, 0].amax(dim=(1, 2)) * 32 + levels[:, 1].amax(dim=(1, 2))


class Reader(torch.nn.Module):
    """Predicts the class of the colour, or prefers the output `offset` beyond it by `margin`."""

    def __init__(
        self, num_classes: int = 1000, offset: int = 0, margin: float = 0.0, image_size: int = 8
    ) -> None:
        super().__init__()
        self.num_classes, self.offset, self.margin, self.image_size = (
            num_classes,
            offset,
            margin,
            image_size,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        number = colour_number(pixels).clamp(max=self.num_classes - 1)
        logits = torch.zeros(len(pixels), self.num_classes)
        rows = torch.arange(len(pixels))
        logits[rows, number] = 5.0
        if self.margin:
            logits[rows, (number + self.offset) % self.num_classes] = 5.0 + self.margin
        return logits
