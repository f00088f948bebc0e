"""Several students of one generated batch against as many runs: students, and a grid of weights."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from benchmarks.bench import Bench, Session
from benchmarks.workload import Workload, batch_size_for, make_workload
from dad_fast.config import Config
from dad_fast.engine.learner import Learner
from dad_fast.engine.step import TrainStep

MOST = 3
# Weights of the terms kd and dad, as `dad-fast ablate --axes weights` varies them.
GRID = ((0.5, 0.5), (0.25, 0.25), (0.25, 1.0), (1.0, 0.25), (1.0, 1.0))


@pytest.fixture(scope="module")
def work(_bench_session: Session) -> Iterator[Workload]:
    size, device = _bench_session.size, _bench_session.device
    wanted = _bench_session.batch_size or batch_size_for(device, size, 256)
    yield make_workload(size, device, wanted)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def test_students(bench: Bench, work: Workload) -> None:
    compare_students(bench, f"students, batch {len(work.batch.labels)}", work)


def test_resnet50_students(bench: Bench) -> None:
    """Smaller students of the same teacher: the batch is a larger part of their step."""
    if bench.size != "paper":
        pytest.skip("at size paper: ResNet-50 from ViT-L/14")
    wanted = bench.session.batch_size or batch_size_for(bench.device, bench.size, 256)
    work = make_workload("paper", bench.device, wanted, preset="dad-rn50")
    compare_students(bench, f"ResNet-50 students, batch {wanted}", work)


def test_grid_of_weights(bench: Bench, work: Workload) -> None:
    base = work.with_method("dad")
    cells = [
        dataclasses.replace(base, loss=dataclasses.replace(base.loss, kd=kd, dad=dad))
        for kd, dad in GRID
    ]
    steps = together(work, cells)
    functions = {
        "1 cell": call(work, [steps.alone[0]]),
        f"{len(GRID)} cells of one batch": call(work, [steps.whole]),
        f"{len(GRID)} runs": call(work, steps.alone),
    }
    counts = dict(zip(functions, (1, len(GRID), 0), strict=True))
    compare(bench, f"weights, batch {len(work.batch.labels)}", work, functions, counts)


def compare_students(bench: Bench, name: str, work: Workload) -> None:
    cfg = work.with_method("dad")
    steps = together(work, [cfg] * MOST)
    functions = {"1 student": call(work, [steps.alone[0]])}
    counts = {"1 student": 1}
    for number in range(2, MOST + 1):
        some = TrainStep(steps.whole.generator, steps.whole.learners[:number], **options(cfg))
        functions[f"{number} students"] = call(work, [some])
        counts[f"{number} students"] = number
    functions[f"{MOST} runs"] = call(work, steps.alone)
    compare(bench, name, work, functions, counts)


@dataclasses.dataclass(frozen=True)
class Steps:
    """A step of all students, and the step of each alone; both train the same students."""

    whole: TrainStep
    alone: Sequence[TrainStep]


def together(work: Workload, cells: Sequence[Config]) -> Steps:
    alone = [work.step(cfg) for cfg in cells]
    learners: list[Learner] = [step.learners[0] for step in alone]
    return Steps(TrainStep(alone[0].generator, learners, **options(cells[0])), alone)


def options(cfg: Config) -> dict[str, Any]:
    return {"num_micro_batches": 1, "tf32": cfg.precision.tf32, "cuda_graphs": "off"}


def call(work: Workload, steps: Sequence[TrainStep]) -> Callable[[], object]:
    return lambda: [step(work.batch, 10, work.cfg.optim.lr) for step in steps]


def compare(
    bench: Bench,
    name: str,
    work: Workload,
    functions: dict[str, Callable[[], object]],
    counts: dict[str, int],
) -> None:
    """counts: function -> students of one batch; 0 = each student alone."""
    flops = work.flops
    of_one, learning = flops.of_step("dad"), 2 * flops.of["student"]
    most = max(counts.values())
    counted = {
        key: of_one + (count - 1) * learning if count else most * of_one
        for key, count in counts.items()
    }
    bench.compare(
        name,
        functions,
        baseline=next(iter(functions)),
        work=len(work.batch.labels),
        config=work.describe(),
        flops=counted,
        energy=True,
        seconds=25,
    )
