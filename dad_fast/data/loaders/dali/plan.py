"""Steps on their way to DALI: the files' bytes and the records as arrays of numbers. Made in worker processes, which need no DALI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import affine_matrix, erase_patch, execute
from dad_fast.data.augment.policy import GEOMETRIC, parse_policy
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
_ARGUMENTS = 6  # numbers per operation


class Planned(NamedTuple):
    """A step on its way to DALI. `batch.images` holds the images that PIL made, [B - n, 3, S, S]; the other n rows are DALI's."""

    batch: Batch
    rows: Tensor  # int64 [n], the rows that DALI makes
    files: Tensor  # uint8, n JPEGs one after the other
    ends: Tensor  # int64 [n], where each of them ends
    patches: Tensor  # uint8, see `split_patches`
    numbers: dict[str, np.ndarray]  # the records, by name of the pipeline's input

    def pin_memory(self) -> Planned:
        return self._replace(batch=self.batch.pin_memory())


class PlannedSteps(Dataset[Planned]):
    """Step number -> Planned."""

    def __init__(self, steps: TrainSteps) -> None:
        self.steps = steps
        self.num_ops = num_operations(steps.aug)

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
        images = (
            torch.from_numpy(np.stack(others))
            if others
            else torch.empty(0, side, side, 3, dtype=torch.uint8)
        )
        numbers = arguments(records, self.num_ops) if records else {"patch": np.zeros(0, np.uint8)}
        return Planned(
            batch=Batch(images=images.permute(0, 3, 1, 2), **fields),
            rows=torch.tensor(rows, dtype=torch.int64),
            files=torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
            if files
            else torch.empty(0, dtype=torch.uint8),
            ends=torch.tensor([len(data) for data in files], dtype=torch.int64).cumsum(0),
            patches=torch.from_numpy(numbers.pop("patch")),
            numbers=numbers,
        )


def num_operations(aug: AugmentConfig) -> int:
    """The most operations that a record of this augmentation holds."""
    policy = parse_policy(aug.aa).num_ops if aug.aa else 0
    jitter = 3 if aug.color_jitter > 0 and (not aug.aa or "3a" in aug.aa) else 0
    return policy + jitter


def can_execute(record: AugmentRecord) -> bool:
    """Whether the pipeline knows everything in the record; PIL makes the few others."""
    if record.img_size < 3 or record.interpolation not in FILTERS:
        return False
    return all(op.interpolation in ("", "bilinear", "bicubic") for op in record.ops)


def arguments(records: Sequence[AugmentRecord], num_ops: int) -> dict[str, np.ndarray]:
    """The records of n samples as arrays, by the name of the pipeline's input that takes them; `patch` is one buffer, see `split`."""
    num = len(records)
    found = {
        "start": np.array([record.crop[:2] for record in records], np.int32),  # [n, 2], x and y
        "shape": np.array(
            [record.crop[2:] for record in records], np.int32
        ),  # [n, 2], width and height
        "filter": np.array([FILTERS.index(record.interpolation) for record in records], np.int32),
        "hflip": np.array([record.hflip for record in records], np.int32),
        "vflip": np.array([record.vflip for record in records], np.int32),
        "box": np.zeros((num, 4), np.int32),  # [n, 4]: top, left, height, width
    }
    kinds = np.zeros((num_ops, num), np.int32)
    values = np.zeros((num_ops, num, _ARGUMENTS), np.float32)
    patches = []
    for row, record in enumerate(records):
        for slot, op in enumerate(record.ops):
            if op.name in GEOMETRIC:
                kinds[slot, row], values[slot, row] = (
                    KIND["geometry"],
                    _of_framed(affine_matrix(op, record.img_size)),
                )
            elif op.name in _TABLES:
                kinds[slot, row], values[slot, row, :4] = (
                    KIND["table"],
                    _table(op.name, int(op.value)),
                )
            else:
                kinds[slot, row], values[slot, row, 0] = KIND[op.name], op.value
        if record.erase is not None:
            found["box"][row] = record.erase[:4]
            patches.append(erase_patch(record.erase).ravel())
    for slot in range(num_ops):
        found[f"kind{slot}"], found[f"value{slot}"] = kinds[slot], values[slot]
    found["patch"] = np.concatenate(patches) if patches else np.zeros(0, np.uint8)
    return found


def split_patches(patches: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """The buffer of `arguments` as one uint8 [h, w, 3] a sample; a single unused pixel where nothing is erased."""
    found, start = [], 0
    unused = np.zeros((1, 1, 3), np.uint8)
    for height, width in boxes[:, 2:].tolist():
        end = start + height * width * 3
        found.append(patches[start:end].reshape(height, width, 3) if height else unused)
        start = end
    return found


def _table(name: str, value: int) -> tuple[int, int, int, int]:
    """What to add below 128, above which level to invert, what to invert anyway, which bits to keep."""
    if name == "posterize":
        return 0, 255, 0, 256 - (1 << (8 - value))
    if name == "solarize_add":
        return value, 255, 0, 255
    if name == "invert" or value == 0:
        return 0, 255, 255, 255
    return 0, value - 1, 0, 255


def _of_framed(matrix: tuple[float, ...]) -> tuple[float, ...]:
    """The same on an image that has a frame of one pixel."""
    a, b, c, d, e, f = matrix
    return a, b, c + 1.0, d, e, f + 1.0
