"""Loading with DALI, our PIL loader, timm's DataLoader and plain PIL: decoding alone, crop and
flip, RandAugment.

`1 core`: all work runs on one core in this process, from start to end of a few batches, so nothing
is prefetched in another's turn and a rate is images per second per core. `all cores`: a worker
process per core; workers continue from call to call, and a call takes several times more batches
than are prefetched. Files are in the page cache.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.bench import Bench
from benchmarks.photos import write_photos, write_shard
from dad_fast.config.schema import AugmentConfig
from dad_fast.data.loaders.choose import train_loader
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.decode import read_rgb
from dad_fast.data.sources.registry import open_source
from dad_fast.errors import EnvironmentProblem

SIDE = 224
SIZES = {"500x375": (500, 375, 64), "2000x1500": (2000, 1500, 8)}  # width, height, number of files
BATCHES = {"500x375": 16, "2000x1500": 4}  # per call on one core
POLICIES = {"crop and flip": "", "RandAugment": "rand-m9-mstd0.5-inc1"}
CORES = sorted(os.sched_getaffinity(0))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAD_FAST_CACHE", str(root / "cache"))
        yield {name: write_photos(root / name, *size) for name, size in SIZES.items()}


@contextmanager
def held_to_one_core() -> Iterator[None]:
    """Pin this thread, and threads started inside, to one core."""
    threads = torch.get_num_threads()
    os.sched_setaffinity(0, CORES[-1:])
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)
        torch.set_num_threads(threads)


def described(source: Source, **more: object) -> dict[str, object]:
    files = [content for i in range(len(source)) if (content := source.encoded(i)) is not None]
    return {
        "kilobytes_per_file": round(sum(map(len, files)) / len(files) / 1e3, 1),
        "source_size": source.sizes[0].tolist(),
    } | more


@pytest.mark.parametrize("size", SIZES)
def test_decode(bench: Bench, folders: dict[str, Path], size: str) -> None:
    source = open_source(str(folders[size]))
    files = [content for i in range(len(source)) if (content := source.encoded(i)) is not None]
    with held_to_one_core():
        functions: dict[str, Callable[[], object]] = {
            "PIL": lambda: [np.asarray(read_rgb(io.BytesIO(content))) for content in files]
        }
        with suppress(ImportError):
            from dad_fast.data.loaders.dali.decode import decoder

            functions["DALI cpu"] = decoder(files, "cpu", num_threads=1)
        bench.compare(
            f"decode, {size}, 1 core",
            functions,
            baseline="PIL",
            work=len(files),
            config=described(source),
            seconds=15,
        )


@pytest.mark.parametrize("size", SIZES)
def test_decode_on_the_gpu(bench: Bench, folders: dict[str, Path], size: str) -> None:
    if bench.device.type != "cuda":
        pytest.skip("needs a GPU")
    pytest.importorskip("nvidia.dali")
    from dad_fast.data.loaders.dali.decode import decoder

    source = open_source(str(folders[size]))
    files = [content for i in range(len(source)) if (content := source.encoded(i)) is not None] * 8
    functions = {
        f"DALI {kind}": decoder(files, kind, num_threads=len(CORES)) for kind in ("cpu", "mixed")
    }
    config = described(source, threads=len(CORES))
    bench.compare(
        f"decode, {size}, all cores",
        functions,
        baseline="DALI cpu",
        work=len(files),
        config=config,
        seconds=15,
    )


def timm_loader(folder: Path, policy: str, batch_size: int, workers: int) -> Iterable[object]:
    """Return timm's data set, transform and collate function in an endless DataLoader; uint8, as
    for its prefetcher.
    """
    timm_data = pytest.importorskip("timm.data")
    from timm.data.loader import fast_collate
    from torch.utils.data import DataLoader, RandomSampler

    dataset = timm_data.create_dataset("", str(folder))
    dataset.transform = timm_data.create_transform(
        SIDE,
        is_training=True,
        use_prefetcher=True,
        auto_augment=policy or None,
        color_jitter=None,
        interpolation="bicubic",
    )
    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 30)
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=fast_collate
    )


def plain_batches(folder: Path, batch_size: int) -> Iterator[object]:
    """Load with a few lines of PIL and numpy: open, crop, resize, flip."""
    random = np.random.default_rng(0)
    files = sorted(folder.rglob("*.jpg"))
    while True:
        batch = np.empty((batch_size, SIDE, SIDE, 3), np.uint8)
        for row in range(batch_size):
            image = Image.open(files[random.integers(len(files))]).convert("RGB")
            share = np.sqrt(random.uniform(0.08, 1.0))
            width, height = int(image.width * share), int(image.height * share)
            left, top = (
                int(random.integers(image.width - width + 1)),
                int(random.integers(image.height - height + 1)),
            )
            image = image.crop((left, top, left + width, top + height)).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
            batch[row] = np.asarray(
                image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image
            )
        yield batch


Take = Callable[[int], Iterator[object]]  # how many batches -> they


def loaders(
    folder: Path, policy: str, batch_size: int, workers: int, device: torch.device
) -> dict[str, Take]:
    source = open_source(str(folder))
    aug = AugmentConfig(aa=policy, color_jitter=0.0, train_interpolation="bicubic")
    theirs = iter(timm_loader(folder, policy.replace("-mstd0.5", ""), batch_size, workers))
    found: dict[str, Take] = {"timm": lambda num: islice(theirs, num)}
    for name, kind in (
        ("ours, PIL", "torchvision"),
        (f"ours, DALI {'cpu' if device.type == 'cpu' else 'mixed'}", "dali"),
    ):
        with suppress(EnvironmentProblem):
            found[name] = _ours(
                train_loader(kind, source, aug, SIDE, batch_size, 0, workers, device=device),
                workers,
            )
    if not workers and not policy:
        plain = plain_batches(folder, batch_size)
        found["plain PIL"] = lambda num: islice(plain, num)
    return found


def _ours(loader: TrainLoader, workers: int) -> Take:
    if not workers:
        return lambda num: loader.batches(0, num)
    batches = loader.batches(0, 1 << 30)
    return lambda num: islice(batches, num)


def exhausted(take: Take, num: int) -> None:
    assert sum(1 for _ in take(num)) == num


def notes(policy: str, workers: int) -> dict[str, str]:
    found = (
        {"timm": "without mstd0.5: its posterize to 0 bits fails with Pillow 13"} if policy else {}
    )
    found["ours, DALI mixed"] = "its batches lie on the GPU, the others' in host memory"
    return (
        found
        if workers
        else found | {"ours, DALI cpu": "builds its pipeline in each call, and that counts"}
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", SIZES)
def test_one_core(bench: Bench, folders: dict[str, Path], size: str, policy: str) -> None:
    if bench.size == "tiny" and size == "2000x1500":
        pytest.skip("not at size tiny: decoding takes the time there, and `decode` shows that")
    batch_size, num = 8, BATCHES[size]
    sizes = {"side": SIDE, "batch_size": batch_size, "workers": 0, "batches_per_call": num}
    config = described(open_source(str(folders[size])), policy=POLICIES[policy], **sizes)
    with held_to_one_core():
        found = loaders(folders[size], POLICIES[policy], batch_size, 0, CPU)
        functions = {name: partial(exhausted, take, num) for name, take in found.items()}
        bench.compare(
            f"{policy}, {size}, 1 core",
            functions,
            baseline="timm",
            work=batch_size * num,
            config=config,
            notes=notes(POLICIES[policy], 0),
            seconds=15,
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_all_cores(bench: Bench, folders: dict[str, Path], policy: str) -> None:
    if bench.size == "tiny" and policy == "RandAugment":
        pytest.skip("not at size tiny")
    batch_size = 16 if bench.size == "tiny" else 128
    workers = len(CORES)
    num = 4 * 2 * workers  # 2 batches a worker are prefetched
    found = loaders(folders["500x375"], POLICIES[policy], batch_size, workers, bench.device)
    sizes = {"side": SIDE, "batch_size": batch_size, "workers": workers, "batches_per_call": num}
    config = described(open_source(str(folders["500x375"])), policy=POLICIES[policy], **sizes)
    functions = {name: partial(exhausted, take, num) for name, take in found.items()}
    bench.compare(
        f"{policy}, 500x375, all cores",
        functions,
        baseline="timm",
        work=batch_size * num,
        config=config,
        notes=notes(POLICIES[policy], workers),
        seconds=30,
    )


def test_reading(bench: Bench, folders: dict[str, Path], tmp_path: Path) -> None:
    """Read the bytes of random files: single files, or members of a shard."""
    folder = open_source(str(folders["500x375"]))
    shard = open_source(str(write_shard(folders["500x375"], tmp_path / "shards" / "0.tar").parent))
    order = np.random.default_rng(0).permutation(len(folder)).tolist()
    assert all(folder.encoded(i) == shard.encoded(i) for i in order)
    with held_to_one_core():
        functions = {
            "folder": lambda: [folder.encoded(i) for i in order],
            "shard": lambda: [shard.encoded(i) for i in order],
        }
        config = described(folder)
        bench.compare(
            "bytes of a file, 500x375, 1 core",
            functions,
            baseline="folder",
            work=len(order),
            config=config,
            seconds=5,
        )
