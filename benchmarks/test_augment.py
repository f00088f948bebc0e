"""Augmentation policies on one core: decode a JPEG, draw the record, execute it at 224 px."""

from __future__ import annotations

import io
from functools import partial
from itertools import count
from pathlib import Path

from PIL import Image

from benchmarks.bench import Bench
from benchmarks.photos import write_photos
from benchmarks.test_loader import held_to_one_core
from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import execute
from dad_fast.data.augment.fractals import fractal
from dad_fast.data.augment.pixmix import FRACTALS
from dad_fast.data.augment.records import sample_record

SIDE, WIDTH, HEIGHT = 224, 500, 375
IMAGES = 8  # per call
BASELINE = "rand-m9-mstd0.5-inc1"
POLICIES = ("", BASELINE, "v0", "3a", "ta", "augmix-m3-w3", "pixmix", "prime")


def test_policies(bench: Bench, tmp_path: Path) -> None:
    folder = write_photos(tmp_path, WIDTH, HEIGHT, IMAGES)
    photos = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    # A process draws each fractal once and keeps it.
    for number in range(FRACTALS):
        fractal(number)
    samples = count()

    def augment(policy: str) -> None:
        settings = AugmentConfig(aa=policy, color_jitter=0.0)
        for photo in photos:
            image = Image.open(io.BytesIO(photo)).convert("RGB")
            record = sample_record(settings, SIDE, 0, 0, next(samples), WIDTH, HEIGHT)
            execute(record, image)

    with held_to_one_core():
        bench.compare(
            "500x375, decoded, on one core",
            {policy or "crop and flip": partial(augment, policy) for policy in POLICIES},
            baseline=BASELINE,
            work=IMAGES,
            config={"img_size": SIDE},
            seconds=30,
        )
