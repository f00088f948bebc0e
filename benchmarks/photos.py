"""JPEGs for benchmarks, cut from the photographs of scikit-learn and scikit-image, as folders and
as shards.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUALITY = 92
CLASSES = ("a", "b")


def photographs() -> list[Image.Image]:
    """Load two photographs of 640x427 px, and more of up to 1411x1411 if scikit-image is installed."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    try:
        from skimage import data
    except ImportError:
        return [Image.fromarray(image) for image in images]
    return [
        Image.fromarray(image)
        for image in (
            *images,
            data.retina(),
            data.hubble_deep_field(),
            data.chelsea(),
            data.coffee(),
        )
    ]


def write_photos(folder: Path, width: int, height: int, num: int) -> Path:
    """Write `num` JPEGs of two classes: different resized cuts, with a little grain so that
    enlarged cuts keep detail.
    """
    random = np.random.default_rng(0)
    sources = photographs()
    for number in range(num):
        source = sources[number % len(sources)]
        share = random.uniform(0.7, 1.0) * min(source.width / width, source.height / height)
        size = (width * share, height * share)
        left, top = (
            random.uniform(0, whole - part) for whole, part in zip(source.size, size, strict=True)
        )
        image = source.resize(
            (width, height),
            Image.Resampling.BICUBIC,
            box=(left, top, left + size[0], top + size[1]),
        )
        pixels = np.asarray(image) + random.normal(0, 4, (height, width, 1))
        label = CLASSES[number % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            folder / label / f"{number:04d}.jpg", quality=QUALITY
        )
    return folder


def write_shard(folder: Path, path: Path) -> Path:
    """Write the files of an image folder as one WebDataset shard, in the same order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(sorted(folder.rglob("*.jpg"))):
            for suffix, content in (
                ("jpg", file.read_bytes()),
                ("cls", b"%d" % CLASSES.index(file.parent.name)),
            ):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path
