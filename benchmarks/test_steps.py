"""Whole training steps against plain distillation, in one interleaved run: CE, KD, DAT, DAD in the
paper's and the authors' order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.bench import Bench, Session
from benchmarks.timm_kd import kd_baseline
from benchmarks.workload import Workload, make_workload

STEPS: dict[str, tuple[str, str, str]] = {  # method, order, form
    "ce": ("ce", "paper", ""),
    "kd": ("kd", "paper", ""),
    "dat": ("dat", "paper", ""),
    "dad, paper's order": ("dad", "paper", ""),
    "dad, authors' order": ("dad", "authors", ""),
    "dad, paper's order, no savings": ("dad", "paper", "no savings"),
    "dad, paper's order, Triton kernels": ("dad", "paper", "kernels"),
}
GRAPHED = ("kd", "dad, paper's order", "dad, paper's order, Triton kernels")


def one_step(work: Workload, name: str, graphs: str = "off") -> Callable[[], object]:
    step = work.step(work.with_method(*STEPS[name], graphs))
    return lambda: step(work.batch, 10, work.cfg.optim.lr)


@pytest.fixture
def on_gpu(bench: Bench) -> None:
    if bench.device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")


@pytest.fixture(scope="module", params=[32, 256])
def work(request: pytest.FixtureRequest, _bench_session: Session) -> Iterator[Workload]:
    size, device, batch_size = _bench_session.size, _bench_session.device, request.param
    if device.type == "cpu" and batch_size > 32:
        batch_size = 100  # the demo's own
    if _bench_session.batch_size:
        if request.param != 32:
            pytest.skip("--bench-batch is the one size")
        batch_size = _bench_session.batch_size
    yield make_workload(size, device, batch_size)


def compare(
    bench: Bench, name: str, work: Workload, steps: dict[str, Callable[[], object]], seconds: float
) -> None:
    flops = work.flops
    baseline, step = kd_baseline(work)
    functions = {baseline: step} | steps
    counted = {key: flops.of_step(*STEPS[key.removesuffix(", graphs")][:2]) for key in steps} | {
        baseline: flops.of_step("kd")
    }
    config = work.describe() | {
        "gflop_per_image": {stage: round(value / 1e9, 4) for stage, value in flops.of.items()}
    }
    try:
        bench.compare(
            name,
            functions,
            baseline=baseline,
            work=len(work.batch.labels),
            config=config,
            flops=counted,
            energy=True,
            seconds=seconds,
        )
    except torch.OutOfMemoryError:
        pytest.skip(f"{name} does not fit into this GPU's memory")
    finally:
        torch.cuda.empty_cache()


def test_steps(bench: Bench, work: Workload) -> None:
    names = [
        name
        for name, (_, _, form) in STEPS.items()
        if form != "kernels" or bench.device.type == "cuda"
    ]
    steps = {name: one_step(work, name) for name in names}
    compare(bench, f"batch {len(work.batch.labels)}", work, steps, seconds=25)


def test_steps_of_resnet50(bench: Bench) -> None:
    """Smaller student of the same teacher: distillation is a larger part of its step."""
    if bench.size != "paper":
        pytest.skip("at size paper: ResNet-50 from ViT-L/14")
    batch_size = bench.session.batch_size or 256
    work = make_workload("paper", bench.device, batch_size, preset="dad-rn50")
    steps = {
        name: one_step(work, name) for name in ("kd", "dad, paper's order", "dad, authors' order")
    }
    compare(bench, f"ResNet-50, batch {batch_size}", work, steps, seconds=10)


@pytest.mark.parametrize("name", GRAPHED)
def test_graphs(bench: Bench, on_gpu: None, work: Workload, name: str) -> None:
    """Run one method at a time, because a captured step keeps the memory of its activations."""
    steps = {name: one_step(work, name), f"{name}, graphs": one_step(work, name, graphs="on")}
    compare(bench, f"batch {len(work.batch.labels)}, graphs, {name}", work, steps, seconds=10)
