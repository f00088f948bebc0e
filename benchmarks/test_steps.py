"""Whole training steps against plain distillation, in one interleaved run: CE, KD, DAT, DAD in the paper's and the authors' order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.bench import Bench
from benchmarks.timm_kd import TimmKD
from benchmarks.workload import Flops, Workload, make_workload
from dad_fast.config.schema import Config, Method

BASELINE = "kd (timm)"
STEPS: dict[str, tuple[Method, str]] = {
    "ce": ("ce", "paper"),
    "kd": ("kd", "paper"),
    "dat": ("dat", "paper"),
    "dad, paper's order": ("dad", "paper"),
    "dad, authors' order": ("dad", "authors"),
}


def one_step(work: Workload, cfg: Config) -> Callable[[], object]:
    step = work.step(cfg)
    return lambda: step(work.batch, 10, cfg.optim.lr)


@pytest.mark.parametrize("batch_size", [32, 256])
def test_steps(bench: Bench, batch_size: int) -> None:
    if bench.device.type == "cpu" and batch_size > 32:
        batch_size = 100  # the demo's own
    work = make_workload(bench.size, bench.device, batch_size)
    flops = Flops(work)
    functions: dict[str, Callable[[], object]] = {BASELINE: TimmKD(work)}
    counted = {BASELINE: flops.of_step("kd")}
    for graphs in ("off", "on") if bench.device.type == "cuda" else ("off",):
        for name, (method, order) in STEPS.items():
            name += ", graphs" if graphs == "on" else ""
            functions[name] = one_step(work, work.with_method(method, order, graphs))
            counted[name] = flops.of_step(method, order)
    config = work.describe() | {"gflop_per_image": {name: round(value / 1e9, 4) for name, value in flops.of.items()}}
    ratios = bench.compare(
        f"batch {batch_size}", functions, baseline=BASELINE, work=batch_size, config=config, flops=counted, energy=True, seconds=25
    )
    assert all(ratio > 0 for ratio in ratios.values())
