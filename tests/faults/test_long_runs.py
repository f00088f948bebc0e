"""Long runs: memory, handles and threads do not grow, and a clock that jumps changes nothing."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from dad_fast.config.schema import Config
from dad_fast.engine.build import Builder
from dad_fast.engine.lockstep import Lockstep
from dad_fast.engine.trainer import Trainer
from dad_fast.methods.settings import resolve

TINY = [
    "method=dad",
    "data.batch_size=4",
    "data.workers=1",
    "log_every=5",
    "eval.every_epochs=0",
    "eval.suites=[]",
    "variants={}",
    "device=cpu",
    "student.name=resnet18",
    "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
    "checkpoint.every_steps=25",
    "ema.model_ema=true",
    "schedule.epochs=1000",
]


def config(*more: str) -> Config:
    return resolve("demo", None, [*TINY, *more], {})


def held() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    objects = gc.get_objects()
    return {
        "KiB": int(resident),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in objects),
        "objects": len(objects),
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("steps", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_handles_and_threads_do_not_grow(tmp_path: Path, steps: int) -> None:
    """Covers the trainer with a loader worker, DAD steps, logs, EMA, and frequent checkpoints.

    100 steps detect a tensor or an object that each step keeps. 10,000 steps detect leaks outside
    Python: memory may grow by 8 MiB, 840 bytes per step.
    """
    cfg = config(f"max_steps={100 + steps}")
    trainer = Trainer(cfg, Builder().build(cfg), tmp_path, "long")
    samples: list[dict[str, int]] = []
    lockstep = Lockstep([trainer])
    submit = lockstep.writer.submit

    def sampled(write: Callable[[], object]) -> None:
        lockstep.writer.wait()
        samples.append(held())
        submit(write)

    lockstep.writer.submit = sampled  # type: ignore[method-assign]
    trainer.start()
    lockstep.train()
    after_warm_up, end = samples[3], samples[-2]
    samples_compared = (after_warm_up, end)
    assert end["handles"] <= after_warm_up["handles"] + 2, samples_compared
    assert end["threads"] <= after_warm_up["threads"], samples_compared
    assert end["KiB"] - after_warm_up["KiB"] < 8192, samples_compared
    assert end["tensors"] <= after_warm_up["tensors"] + 4, samples_compared
    assert end["objects"] <= after_warm_up["objects"] + 0.2 * steps, samples_compared
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) <= 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [row["step"] for row in rows if row["kind"] == "train"]
    assert logged == list(range(5, 100 + steps + 1, 5))


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Durations use the monotonic clock, and nothing depends on the wall clock."""
    cfg = config("max_steps=8", "data.workers=0")
    straight = Trainer(cfg, Builder().build(cfg), tmp_path / "straight", "straight")
    straight.start()
    Lockstep([straight]).train()
    jumps = iter([-1e9, 1e9] * 10_000)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    jumping = Trainer(cfg, Builder().build(cfg), tmp_path / "jumping", "jumping")
    jumping.start()
    Lockstep([jumping]).train()
    summary = jumping.summary()
    assert 0 < summary["seconds"] < 600
    one, other = (
        tmp_path / name / "checkpoints" / "step-8" / "train.safetensors"
        for name in ("straight", "jumping")
    )
    assert one.read_bytes() == other.read_bytes()
