"""Memory of a whole step: does it fit into 79 GiB, and into this card, with and without expandable
segments?

The allocator is limited and switched inside one process, so that the models are made once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.bench import Bench, Session, reason, timed_row
from benchmarks.timing import peaks, reset_peaks
from benchmarks.workload import Workload, batch_size_for, make_workload

STEPS = {"cuda": 6, "cpu": 2}  # in graphs: three plain, the capture, and replays
TIMED = 2


@pytest.fixture(scope="module")
def work(_bench_session: Session) -> Iterator[Workload]:
    size, device = _bench_session.size, _bench_session.device
    yield make_workload(size, device, batch_size_for(device, size, 256))


@pytest.fixture(params=[0, 79], ids=["whole card", "79 GiB"])
def limit_gib(request: pytest.FixtureRequest, bench: Bench) -> Iterator[int]:
    """Limit this process to so many GiB; 0 = all of the card."""
    if bench.device.type != "cuda":
        yield request.param
        return
    total = torch.cuda.get_device_properties(bench.device).total_memory
    if request.param * 2**30 > total:
        pytest.skip("this card has less memory")
    share = request.param * 2**30 / total or 1.0
    torch.cuda.set_per_process_memory_fraction(share, bench.device)
    yield request.param
    torch.cuda.set_per_process_memory_fraction(1.0, bench.device)


@pytest.fixture(params=[True, False], ids=["expandable segments", "fixed segments"])
def expandable(request: pytest.FixtureRequest, bench: Bench) -> bool:
    if bench.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{request.param}")
    return request.param


def test_memory(bench: Bench, work: Workload, limit_gib: int, expandable: bool) -> None:
    """Record peaks of a step in graphs; one that does not fit is recorded as such."""
    on_gpu = bench.device.type == "cuda"
    batch_size, lr = len(work.batch.labels), work.cfg.optim.lr
    limit = f"{limit_gib} GiB" if limit_gib else "whole card"
    segments = "expandable segments" if expandable else "fixed segments"
    name = "dad, paper's order, graphs"
    config = work.describe() | {"limit_gib": limit_gib, "expandable_segments": expandable}
    reset_peaks(bench.device)
    times: list[float] = []
    left_out = {}
    try:
        step = work.step(work.with_method("dad", graphs="auto" if on_gpu else "off"))
        for number in range(STEPS[bench.device.type]):
            start = time.perf_counter()
            step(work.batch, number, lr)[0]["loss"].item()  # waits for the device
            times.append(time.perf_counter() - start)
        config["captured"] = step.graphs is not None and step.graphs.captured
    except torch.OutOfMemoryError as error:
        left_out[name] = reason(error)
    rows = [] if left_out else [timed_row(name, times[-TIMED:], times[-TIMED:], batch_size)]
    bench.add(
        f"batch {batch_size}, {limit}, {segments}",
        rows,
        baseline=name,
        work=batch_size,
        config=config,
        memory=peaks(bench.device),
        left_out=left_out,
    )
