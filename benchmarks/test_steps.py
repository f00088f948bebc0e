"""Whole training steps against plain distillation, in one interleaved run: CE, KD, DAT, DAD in the
paper's and the authors' order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.bench import Bench, Session
from benchmarks.timm_kd import kd_baseline
from benchmarks.workload import Workload, batch_size_for, make_workload

STEPS: dict[str, tuple[str, str, str, str]] = {  # method, order, form, graphs
    "ce": ("ce", "paper", "", "off"),
    "kd": ("kd", "paper", "", "off"),
    "kd, graphs": ("kd", "paper", "", "on"),
    "dat": ("dat", "paper", "", "off"),
    "dad, paper's order": ("dad", "paper", "", "off"),
    "dad, authors' order": ("dad", "authors", "", "off"),
    "dad, paper's order, no savings": ("dad", "paper", "no savings", "off"),
    "dad, paper's order, graphs": ("dad", "paper", "", "on"),
    "dad, paper's order, kernels": ("dad", "paper", "kernels", "off"),
    "dad, paper's order, kernels, graphs": ("dad", "paper", "kernels", "on"),
    "dad, paper's order, kernels, compiled, graphs": ("dad", "paper", "compiled", "on"),
}
PLAIN = [name for name, (*_, form, graphs) in STEPS.items() if not form and graphs == "off"]
# Forms of a step on a GPU, by comparison. A captured step keeps the memory of its activations, so
# that not all of them fit at once.
FORMS = {
    "plain and graphs": ["kd", "kd, graphs", "dad, paper's order", "dad, paper's order, graphs"],
    "kernels and graphs": ["dad, paper's order, kernels, graphs"],
    "kernels, compiled and graphs": ["dad, paper's order, kernels, compiled, graphs"],
}


def one_step(work: Workload, name: str) -> Callable[[], object]:
    step = work.step(work.with_method(*STEPS[name]))
    return lambda: step(work.batch, 10, work.cfg.optim.lr)


@pytest.fixture(scope="module", params=[32, 256])
def work(request: pytest.FixtureRequest, _bench_session: Session) -> Iterator[Workload]:
    size, device = _bench_session.size, _bench_session.device
    batch_size = _bench_session.batch_size
    if batch_size and request.param != 32:
        pytest.skip("--bench-batch is the one size")
    yield make_workload(size, device, batch_size or batch_size_for(device, size, request.param))


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """Give captured steps' memory back before the next test: they hang in cycles of references."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def compare(
    bench: Bench, name: str, work: Workload, steps: dict[str, Callable[[], object]], seconds: float
) -> None:
    flops = work.flops
    baseline, step = kd_baseline(work)
    functions = {baseline: step} | steps
    counted = {key: flops.of_step(*STEPS[key][:2]) for key in steps} | {
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


def test_steps(bench: Bench, work: Workload) -> None:
    names = [*PLAIN, "dad, paper's order, no savings"]
    if bench.device.type == "cuda":
        names.append("dad, paper's order, kernels")
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


@pytest.mark.parametrize("form", FORMS)
def test_forms(bench: Bench, work: Workload, form: str) -> None:
    names = FORMS[form]
    if bench.device.type != "cuda":  # a rehearsal: no graphs, no compiling
        names = [name for name in names if name in PLAIN]
        if not names:
            pytest.skip("needs CUDA")
    steps = {name: one_step(work, name) for name in names}
    compare(bench, f"batch {len(work.batch.labels)}, {form}", work, steps, seconds=10)
