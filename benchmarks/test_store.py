"""Stores on one core: gathering records and images, joining by key, writing. Files are in the page
cache.

All work is on the host, so time it with `--bench-device cpu` on any machine.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench import Bench
from benchmarks.photos import photographs
from dad_fast.data.augment.execute import eval_transform
from dad_fast.store import AdversarialStore, Manifest, StoreRows, StoreWriter, hash_keys

BATCH, SIDE = 256, 224
NUM_RECORDS = {"tiny": 20_480, "base": 102_400, "paper": 1_281_167}
NUM_IMAGES = {"tiny": 2_048, "base": 8_192, "paper": 32_768}
F8 = {"code_bits": 14, "code_grid": (28, 28)}
CLASSES = tuple((i, f"n{i:08d}", f"class {i}") for i in range(1000))


@pytest.fixture(autouse=True)
def _host(bench: Bench) -> None:
    if bench.device.type != "cpu":
        pytest.skip("reads and writes stores on the host: run with --bench-device cpu")


def make_manifest(num: int, **changes: Any) -> Manifest:
    values = {
        "kind": "adversarial",
        "classes": CLASSES,
        "source": "0" * 64,
        "settings": {},
        "hashes": {},
        "num_samples": num,
    }
    return Manifest(**{**values, "block_size": BATCH, "blocks_per_shard": 16, **changes})


def make_records(manifest: Manifest, start: int, num: int) -> StoreRows:
    rng = np.random.default_rng(start)
    return StoreRows(
        keys=[f"n{row % 1000:08d}/{row}.JPEG" for row in range(start, start + num)],
        labels=np.arange(start, start + num) % manifest.num_classes,
        outputs=rng.standard_normal((num, manifest.num_classes), np.float32),
        kept=np.ones(num, bool),
        changed=np.zeros(num, np.float32),
        codes=rng.integers(0, 256, (num, manifest.code_bytes), np.uint8)
        if manifest.code_bits
        else None,
        images=photos(num) if manifest.images != "none" else None,
    )


def photos(num: int) -> np.ndarray:
    """Cut photographs; uint8 [num, 224, 224, 3]."""
    sources = photographs()
    rng = np.random.default_rng(0)
    cuts = []
    for i in range(min(num, 64)):
        image = sources[i % len(sources)]
        cut = min(2 * SIDE, *image.size)
        left, top = (int(rng.integers(0, side - cut + 1)) for side in image.size)
        cuts.append(
            eval_transform(image.crop((left, top, left + cut, top + cut)), SIDE, 1.0, "bicubic")
        )
    return np.stack(cuts)[np.arange(num) % len(cuts)]


def write(folder: Path, manifest: Manifest) -> AdversarialStore:
    writer = StoreWriter.open(folder, manifest)
    block = make_records(manifest, 0, manifest.block_size)
    for number in writer.shards_to_do():
        with writer.shard(number) as shard:
            for part in shard.todo():
                keys = [f"n{row % 1000:08d}/{row}.JPEG" for row in range(part.start, part.stop)]
                cut = {
                    name: value[: len(part)]
                    for name, value in vars(block).items()
                    if value is not None
                }
                shard.append(StoreRows(**{**cut, "keys": keys}))
    assert writer.finish() == []
    return AdversarialStore(folder)


def batches(num: int) -> Callable[[], np.ndarray]:
    """Return a new random batch of rows at each call."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, num, BATCH) for _ in range(64)]

    def endless() -> Iterator[np.ndarray]:
        while True:
            yield from rows

    return endless().__next__


@pytest.mark.parametrize("outputs", ["full", "topk:10@4"])
def test_records(bench: Bench, tmp_path: Path, outputs: str) -> None:
    """Codes and teacher outputs of random rows.

    The bound is the same bytes gathered from one array in memory.
    """
    num = NUM_RECORDS[bench.size]
    store = write(tmp_path / "store", make_manifest(num, outputs=outputs, **F8))
    rows = batches(num)
    array = np.concatenate(
        [
            np.fromfile(path, store.manifest.data_dtype)
            for path in sorted(store.folder.glob("*.data"))
        ]
    )
    bench.compare(
        f"codes and {outputs} outputs, batch of {BATCH} random rows",
        {
            "store": lambda: (store.codes(r := rows()), store.outputs(r)),
            "store: flags": lambda: store.kept(rows()),
            "one array in memory": lambda: array[rows()],
        },
        baseline="one array in memory",
        work=BATCH,
        unit="record",
        config={
            "records": num,
            "bytes": store.manifest.data_dtype.itemsize,
            "shards": store.manifest.geometry.num_shards,
            **F8,
        },
        notes={
            "one array in memory": "numpy's own gather of the same bytes",
            "store: flags": "kept() alone",
        },
    )


def test_images(bench: Bench, tmp_path: Path) -> None:
    """Random images of 224 px, against decoding them with PIL from JPEG bytes of the same size."""
    num = NUM_IMAGES[bench.size]
    raw = write(tmp_path / "raw", make_manifest(num, images="raw", image_size=(SIDE, SIDE)))
    stores = {
        form: write(
            tmp_path / form, make_manifest(64, block_size=64, images=form, image_size=(SIDE, SIDE))
        )
        for form in ("webp", "jpeg:95")
    }
    rows, few, out = batches(num), batches(64), np.empty((BATCH, SIDE, SIDE, 3), np.uint8)
    jpegs = []
    for image in photos(64):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        jpegs.append(file.getvalue())

    def pil() -> None:
        for i in range(BATCH):
            out[i] = np.asarray(Image.open(io.BytesIO(jpegs[i % 64])).convert("RGB"))

    size = {
        form: sum(path.stat().st_size for path in store.folder.glob("*.images")) // 64
        for form, store in stores.items()
    }
    bench.compare(
        f"images of {SIDE} px, batch of {BATCH} random rows",
        {
            "raw, into a buffer": lambda: raw.images(rows(), out=out),
            "raw": lambda: raw.images(rows()),
            "webp": lambda: stores["webp"].images(few(), out=out),
            "jpeg:95": lambda: stores["jpeg:95"].images(few(), out=out),
            "PIL, JPEG 4:2:0": pil,
        },
        baseline="PIL, JPEG 4:2:0",
        work=BATCH,
        config={"raw_images": num, "bytes": {"raw": SIDE * SIDE * 3, **size}},
        notes={"raw": "new memory for each batch"},
        seconds=20,
    )


def test_join(bench: Bench, tmp_path: Path) -> None:
    """Find a store's rows for a source's keys; most of the time is hashing the keys."""
    num = NUM_RECORDS[bench.size]
    store = write(
        tmp_path / "store", make_manifest(num, classes=CLASSES[:2], code_bits=8, code_grid=(1, 1))
    )
    keys = [f"n{row % 1000:08d}/{row}.JPEG" for row in range(num)]
    mixed = [keys[i] for i in np.random.default_rng(0).permutation(num)]

    def by_dict() -> list[int]:
        place = {key.tobytes(): row for row, key in enumerate(store.keys(np.arange(num)))}
        return [place[key.tobytes()] for key in hash_keys(mixed)]

    assert store.rows(mixed).tolist() == by_dict()
    bench.compare(
        "rows of all keys",
        {
            "same order": lambda: store.rows(keys),
            "any order": lambda: store.rows(mixed),
            "a dict": by_dict,
        },
        baseline="a dict",
        work=num,
        unit="key",
        config={"keys": num},
    )


@pytest.mark.parametrize(("images", "num"), [("none", 2 * BATCH), ("raw", 2 * BATCH), ("webp", 64)])
def test_writing(bench: Bench, tmp_path: Path, images: str, num: int) -> None:
    """Write a shard of two blocks with checksums, sync and rename, against numpy.save of the same
    arrays.
    """
    manifest = make_manifest(
        num,
        block_size=num // 2,
        images=images,
        image_size=(SIDE, SIDE) if images != "none" else (),
        **F8,
    )
    blocks = [make_records(manifest, start, num // 2) for start in (0, num // 2)]

    def ours() -> None:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        with StoreWriter.open(tmp_path / "store", manifest).shard(0) as shard:
            for block in blocks:
                shard.append(block)

    def plain() -> None:
        for block in blocks:
            arrays: dict[str, Any] = {
                name: value for name, value in vars(block).items() if isinstance(value, np.ndarray)
            }
            np.savez(tmp_path / "plain.npz", **arrays)

    bench.compare(
        f"writing, codes, full outputs, images {images}",
        {"store": ours, "numpy.savez": plain},
        baseline="numpy.savez",
        work=num,
        unit="record",
        config={"records": num, "images": images, **F8},
        notes={"numpy.savez": "raw images always, CRC-32, not synced"},
    )
