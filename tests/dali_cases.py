"""Helpers of the DALI tests: photos as JPEG bytes, and records executed by both DALI and PIL."""

from __future__ import annotations

import dataclasses
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nvidia.dali")
torch = pytest.importorskip("torch")

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import execute
from dad_fast.data.augment.records import AugmentRecord
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.decode import read_rgb

CENTER = AugmentConfig(crop="center", hflip=0.0, color_jitter=0.0)
FULL = AugmentConfig(
    aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0, mixup_prob=0.9, vflip=0.2
)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


@lru_cache
def photos():
    """Two real photos as they were published, and a made one: smooth shades, hard edges, noise."""
    datasets = pytest.importorskip("sklearn.datasets")
    folder = Path(datasets.__file__).parent / "images"
    y, x = np.mgrid[0:300, 0:400]
    made = np.stack([x * 255 // 399, y * 255 // 299, (x // 16 + y // 16) % 2 * 255], axis=-1)
    made[:, 200:, 2] = np.random.RandomState(0).randint(0, 256, (300, 200))
    return [
        *((folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")),
        jpeg(Image.fromarray(made.astype(np.uint8))),
    ]


class Files:
    """A source of encoded images in memory.

    `plain` are those that `encoded` returns; `torn` are other bytes for some of them, as if a file
    were being rewritten while DALI's loader reads it.
    """

    name = fingerprint = "files"
    max_bad_share = 1.0

    def __init__(self, files, plain=None, torn=()):
        self.files = files
        self.plain = [True] * len(files) if plain is None else plain
        self.classes = ClassMap(((0, "a", "a"), (1, "b", "b")))
        self.keys = [f"file{i}" for i in range(len(files))]
        self.labels = np.arange(len(files), dtype=np.int64) % 2
        self.torn = dict(torn)
        self.sizes = np.array([Image.open(io.BytesIO(data)).size for data in files], dtype=np.int32)
        self.ok = np.ones(len(files), dtype=bool)

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return read_rgb(io.BytesIO(self.files[index]), self.keys[index])

    def encoded(self, index):
        return self.torn.get(index, self.files[index]) if self.plain[index] else None

    def describe(self):
        return self.name


def record_of(image, img_size, **changes):
    record = AugmentRecord(
        0, 0, image.size, img_size, (0, 0, *image.size), "bicubic", False, False, (), None
    )
    return dataclasses.replace(record, **changes)


def by_dali(files, records, device="cpu"):
    """uint8 [n, S, S, 3]"""
    from dad_fast.data.loaders.dali.loader import _Engine
    from dad_fast.data.loaders.dali.plan import Planned, arguments
    from dad_fast.data.loaders.steps import Batch, TrainSteps

    num_ops = max(len(record.ops) for record in records)
    aug = (
        AugmentConfig(aa=f"rand-m9-n{num_ops}", reprob=1.0, color_jitter=0.0)
        if num_ops
        else AugmentConfig(reprob=1.0, color_jitter=0.0)
    )
    steps = TrainSteps(Files(files), aug, records[0].img_size, len(files), 0, 0, 1)
    numbers = arguments(records, num_ops)
    nothing = torch.zeros(len(files), dtype=torch.int64)
    batch = Batch(torch.empty(0), nothing, nothing, nothing, nothing, nothing, nothing, 0, 0, ())
    planned = Planned(
        batch=batch,
        rows=torch.arange(len(files)),
        files=torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8),
        ends=torch.tensor([len(data) for data in files]).cumsum(0),
        patches=torch.from_numpy(numbers.pop("patch")),
        numbers=numbers,
    )
    engine = _Engine(steps, torch.device(device), 1)
    engine.feed(planned)
    images = engine.take(planned).images
    assert images.device.type == torch.device(device).type
    return images.permute(0, 2, 3, 1).cpu().numpy()


@lru_cache
def decoded(data):
    return read_rgb(io.BytesIO(data))


def by_pil(files, records):
    return np.stack(
        [execute(record, decoded(data)) for record, data in zip(records, files, strict=True)]
    )


def errors(files, records, device="cpu"):
    """|DALI - PIL| in levels, int [n, S, S, 3]"""
    return np.abs(by_dali(files, records, device).astype(int) - by_pil(files, records))
