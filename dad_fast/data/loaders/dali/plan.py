"""Steps on their way to DALI: the files' bytes and the records as arrays of numbers.

Worker processes make them; they do not import DALI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.data.augment.execute import erase_patch, execute
from dad_fast.data.augment.operations import affine_matrix
from dad_fast.data.augment.policies import most_operations
from dad_fast.data.augment.policy import GEOMETRIC
from dad_fast.data.augment.records import AugmentRecord
from dad_fast.data.loaders.dali.jpeg import is_sound
from dad_fast.data.loaders.steps import Batch, TrainSteps

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
KIND = {
    name: number
    for number, name in enumerate(
        (
            "geometry",
            "table",
            "brightness",
            "contrast",
            "color",
            "auto_contrast",
            "equalize",
            "sharpness",
            "gaussian_blur",
        ),
        start=1,
    )
}
_TABLES = ("invert", "posterize", "solarize", "solarize_add")
# Numbers per operation.
_ARGUMENTS = 6


class Planned(NamedTuple):
    """A step on its way to DALI.

    `batch.images` holds the images that PIL made, [B - n, 3, S, S]; DALI makes the other n rows.
    """

    batch: Batch
    rows: Tensor  # int64 [n], the rows that DALI makes
    files: Tensor  # uint8, n JPEGs one after the other
    ends: Tensor  # int64 [n], end of each JPEG in `files`
    patches: Tensor  # uint8, see `split_patches`
    numbers: dict[str, np.ndarray]  # the records, by name of the pipeline's input

    def pin_memory(self) -> Planned:
        return self._replace(batch=self.batch.pin_memory())


class PlannedSteps(Dataset[Planned]):
    """Step number -> Planned."""

    def __init__(self, steps: TrainSteps) -> None:
        self.steps = steps
        self.num_ops = most_operations(steps.aug)

    def __getitem__(self, step: int) -> Planned:
        records: list[AugmentRecord] = []
        rows: list[int] = []
        files: list[bytes] = []
        others: list[np.ndarray] = []

        def load(row: int, record: AugmentRecord) -> None:
            data = self.steps.source.encoded(record.sample) if can_execute(record) else None
            if data is not None and is_sound(data, *record.size):
                records.append(record)
                rows.append(row)
                files.append(data)
            else:
                others.append(execute(record, self.steps.image(record.sample)))

        fields = self.steps.fields(step, load)
        side = self.steps.img_size
        images = torch.empty(0, side, side, 3, dtype=torch.uint8)
        if others:
            images = torch.from_numpy(np.stack(others))
        numbers = arguments(records, self.num_ops) if records else {"patch": np.zeros(0, np.uint8)}
        return Planned(
            batch=Batch(images=images.permute(0, 3, 1, 2), **fields),
            rows=torch.tensor(rows, dtype=torch.int64),
            files=join_files(files),
            ends=torch.tensor([len(data) for data in files], dtype=torch.int64).cumsum(0),
            patches=torch.from_numpy(numbers.pop("patch")),
            numbers=numbers,
        )


def join_files(files: Sequence[bytes]) -> Tensor:
    """Join files to one uint8 tensor, which may be empty."""
    if not files:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)


def can_execute(record: AugmentRecord) -> bool:
    """Return whether the pipeline supports all of the record; PIL executes the few others."""
    if record.img_size < 3 or record.interpolation not in FILTERS or record.blend is not None:
        return False
    return all(op.interpolation in ("", "bilinear", "bicubic") for op in record.ops)


def arguments(records: Sequence[AugmentRecord], num_ops: int) -> dict[str, np.ndarray]:
    """Convert the records of n samples to arrays, keyed by the pipeline's input.

    `patch` is one buffer, see `split_patches`.
    """
    num = len(records)
    found = {
        # [n, 2], x and y.
        "start": np.array([record.crop[:2] for record in records], np.int32),
        # [n, 2], width and height.
        "shape": np.array([record.crop[2:] for record in records], np.int32),
        "filter": np.array([FILTERS.index(record.interpolation) for record in records], np.int32),
        "hflip": np.array([record.hflip for record in records], np.int32),
        "vflip": np.array([record.vflip for record in records], np.int32),
        # [n, 4]: top, left, height, width.
        "box": np.zeros((num, 4), np.int32),
    }
    kinds = np.zeros((num_ops, num), np.int32)
    values = np.zeros((num_ops, num, _ARGUMENTS), np.float32)
    patches = []
    for row, record in enumerate(records):
        for slot, op in enumerate(record.ops):
            if op.name in GEOMETRIC:
                a, b, c, d, e, f = affine_matrix(op, record.img_size)
                kinds[slot, row] = KIND["geometry"]
                # The pipeline puts a frame of one pixel around the image.
                values[slot, row] = a, b, c + 1.0, d, e, f + 1.0
            elif op.name in _TABLES:
                kinds[slot, row] = KIND["table"]
                values[slot, row, :4] = _table(op.name, int(op.value))
            else:
                kinds[slot, row] = KIND[op.name]
                values[slot, row, 0] = op.value
        if record.erase is not None:
            found["box"][row] = record.erase[:4]
            patches.append(erase_patch(record.erase).ravel())
    for slot in range(num_ops):
        found[f"kind{slot}"], found[f"value{slot}"] = kinds[slot], values[slot]
    found["patch"] = np.concatenate(patches) if patches else np.zeros(0, np.uint8)
    return found


def split_patches(patches: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """Split the buffer of `arguments` into one uint8 [h, w, 3] a sample.

    A sample without an erased box gets a single unused pixel.
    """
    found = []
    unused = np.zeros((1, 1, 3), np.uint8)
    start = 0
    for height, width in boxes[:, 2:].tolist():
        end = start + height * width * 3
        found.append(patches[start:end].reshape(height, width, 3) if height else unused)
        start = end
    return found


def _table(name: str, value: int) -> tuple[int, int, int, int]:
    """Return (addend below 128, level above which to invert, bits to invert, bits to keep)."""
    if name == "posterize":
        return 0, 255, 0, 256 - (1 << (8 - value))
    if name == "solarize_add":
        return value, 255, 0, 255
    if name == "invert" or value == 0:
        return 0, 255, 255, 255
    return 0, value - 1, 0, 255
