"""LP-CLIP: what the strong view costs beside the weak one, in time and memory, and what a step costs with and without kept features.

Views are made by PIL on one core, as the loader makes them, from files in the page cache. The memory is what they add to the peak of a
process that does nothing else. A step's batch lies on the device; the reading of kept features is in it.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.bench import Bench
from benchmarks.photos import write_photos
from benchmarks.test_loader import SIDE, described, held_to_one_core
from benchmarks.workload import Workload, make_workload
from dad_fast.config.schema import AugmentConfig
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.base import open_source
from dad_fast.engine.build import make_step
from dad_fast.engine.update import Update
from dad_fast.methods.lp_clip import pseudo_labels
from dad_fast.models.probe import build_probe

CROP = AugmentConfig(scale=(0.35, 1.0), color_jitter=0.0, train_interpolation="bicubic")
VIEWS = {
    "weak": AugmentConfig(
        crop="center", hflip=0.0, color_jitter=0.0, train_interpolation="bicubic"
    ),
    "crop and flip": CROP,
    "Cutout": dataclasses.replace(CROP, reprob=1.0, remode="const"),
    "RandAugment": dataclasses.replace(CROP, aa="rand-m9-mstd0.5-inc1"),
    "RandAugment and Cutout": dataclasses.replace(
        CROP, aa="rand-m9-mstd0.5-inc1", reprob=1.0, remode="const"
    ),
}
BATCH, BATCHES = 16, 2  # per call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAD_FAST_CACHE", str(root / "cache"))
        return write_photos(root / "500x375", 500, 375, 64)


def views(folder: Path, name: str) -> None:
    """A few batches of these views."""
    loader = TrainLoader(open_source(str(folder)), VIEWS[name], SIDE, BATCH, seed=0, workers=0)
    for _ in loader.batches(0, BATCHES):
        pass


def added_memory(folder: Path, name: str) -> float:
    """MiB that making these views adds to the peak of a process of its own; Linux."""
    code = "import sys; from pathlib import Path; from benchmarks.test_lp_clip import peak_memory, views; before = peak_memory(); "
    code += "views(Path(sys.argv[1]), sys.argv[2]); print(peak_memory() - before)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), name], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1]) / 1024


def peak_memory() -> int:
    """KiB. Not getrusage's, which counts what the process was before it became this program."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1])


def test_views(bench: Bench, folder: Path) -> None:
    watched = (
        ("weak", "RandAugment and Cutout") if bench.size == "tiny" else VIEWS
    )  # a process each
    notes = {
        name: f"adds {added_memory(folder, name):.0f} MiB to the peak of a process"
        for name in watched
    }
    with held_to_one_core():
        functions = {name: partial(views, folder, name) for name in VIEWS}
        config = described(
            open_source(str(folder)), side=SIDE, batch_size=BATCH, batches_per_call=BATCHES
        )
        bench.compare(
            "views, 500x375, 1 core",
            functions,
            baseline="weak",
            work=BATCH * BATCHES,
            config=config,
            notes=notes,
            seconds=15,
        )


def test_steps(bench: Bench) -> None:
    work = make_workload(bench.size, bench.device)
    num = len(work.batch.labels)
    functions = {
        "encoder in every step": probe_step(work, kept=False),
        "features kept": probe_step(work, kept=True),
    }
    config = {
        name: work.describe()[name]
        for name in ("teacher", "weights", "batch_size", "img_size", "precision", "optimizer")
    }
    bench.compare(
        f"steps, batch {num}",
        functions,
        baseline="encoder in every step",
        work=num,
        config=config,
        energy=True,
        seconds=15,
    )


def probe_step(work: Workload, kept: bool) -> Callable[[], object]:
    augment = dataclasses.replace(work.cfg.augment, mixup=0.0, cutmix=0.0)
    engine = dataclasses.replace(work.cfg.engine, cuda_graphs="off")
    cfg = dataclasses.replace(work.cfg, method="lp-clip", augment=augment, engine=engine)
    probe = build_probe(work.teacher, "").to(work.device)
    step = make_step(cfg, probe, None, None, Update(probe, cfg, work.device))
    pixels = work.batch.images.float() / 255
    with torch.no_grad():
        labels, confidence = pseudo_labels(work.teacher(pixels))
    features = probe.features(pixels).cpu()
    batch = dataclasses.replace(work.batch, pseudo_labels=labels, confidence=confidence)
    order = torch.arange(len(labels))

    def from_the_table() -> object:
        return step(dataclasses.replace(batch, features=features[order].to(work.device)), 10, 0.1)

    return from_the_table if kept else lambda: step(batch, 10, 0.1)
