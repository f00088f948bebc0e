"""Steps that load their batch first: decoding and augmentation in the same process, as in the demo.

Loader processes would prefetch in another function's turn, which hides their cost. The sizes with
224 px are therefore timed with the real command (scripts/gpu_check.sh vitb16), one run after
another.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.bench import Bench
from benchmarks.test_steps import STEPS
from benchmarks.workload import Workload, make_workload
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.registry import open_source


def loaded_step(work: Workload, name: str) -> Callable[[], object]:
    cfg = work.with_method(*STEPS[name])
    source = open_source(cfg.data.data_dir, cfg.data.train_split)
    loader = TrainLoader(
        source, cfg.augment, cfg.augment.img_size, len(work.batch.labels), seed=0, workers=0
    )
    batches, step = loader.batches(0, 1_000_000), work.step(cfg)
    return lambda: step(next(batches), 10, cfg.optim.lr)


def test_end_to_end(bench: Bench) -> None:
    if bench.size != "tiny":
        pytest.skip("at this size by the real command: scripts/gpu_check.sh vitb16")
    work = make_workload("tiny", bench.device, 100)
    flops = work.flops
    names = ["kd", "dat", "dad, paper's order", "dad, authors' order"]
    bench.compare(
        "batch 100, loaded in the process",
        {name: loaded_step(work, name) for name in names},
        baseline="kd",
        work=100,
        config=work.describe(),
        predicted={name: flops.of_step(*STEPS[name][:2]) / flops.of_step("kd") for name in names},
        seconds=15,
    )
