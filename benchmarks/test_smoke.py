"""First check of a GPU: the same few steps of DAD in every form have the same finite losses.

The record of each form holds its losses, whether its step was captured, its time and its memory.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import pytest
import torch

from benchmarks.bench import Bench, Session
from benchmarks.timing import peaks, reset_peaks
from benchmarks.workload import Workload, batch_size_for, make_workload

FORMS = {  # form, graphs
    "plain": ("", "off"),
    "graphs": ("", "on"),
    "kernels": ("kernels", "off"),
    "kernels and graphs": ("kernels", "on"),
}
STEPS = {"cuda": 8, "cpu": 2}  # in graphs: three plain, then replays
# Of the loss, relative to the plain form: graphs run the same kernels; others round elsewhere, and
# later steps start from weights that differ.
TOLERANCE = {"graphs": 2e-3, "kernels": 2e-2, "kernels and graphs": 2e-2}


@pytest.fixture(scope="module")
def work(_bench_session: Session) -> Iterator[Workload]:
    size, device = _bench_session.size, _bench_session.device
    yield make_workload(size, device, batch_size_for(device, size, 64))


@pytest.fixture(scope="module")
def losses_of() -> dict[str, list[float]]:
    """Losses by form, of the tests that ran before."""
    return {}


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """Give a captured step's memory back before the next form: it hangs in cycles of references."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("form", FORMS)
def test_form(bench: Bench, work: Workload, losses_of: dict[str, list[float]], form: str) -> None:
    on_gpu = bench.device.type == "cuda"
    steps = STEPS[bench.device.type]
    kind, graphs = FORMS[form]
    reset_peaks(bench.device)
    step = work.step(work.with_method("dad", form=kind, graphs=graphs if on_gpu else "off"))
    torch.manual_seed(1)
    lr = work.cfg.optim.lr
    losses = [step(work.batch, number, lr)[0]["loss"].item() for number in range(steps)]
    losses_of[form] = losses
    captured = step.graphs is not None and step.graphs.captured
    found = {"losses": losses, "captured": captured, "memory": peaks(bench.device)}
    bench.compare(
        f"batch {len(work.batch.labels)}, {form}",
        {form: lambda: step(work.batch, steps, lr)},
        baseline=form,
        work=len(work.batch.labels),
        config=work.describe() | found,
        seconds=2,
    )
    assert all(math.isfinite(loss) for loss in losses), losses
    assert captured == (graphs == "on" and on_gpu)
    if form != "plain":
        assert losses == pytest.approx(losses_of["plain"], rel=TOLERANCE[form])
