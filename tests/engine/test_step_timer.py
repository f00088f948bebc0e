"""Time of training, and the advice for input-bound runs."""

from __future__ import annotations

import time

import pytest
import torch

from dad_fast import cores
from dad_fast.engine import step_timer as clock_module
from dad_fast.engine.step_timer import StepTimer, Window, input_bound


class HandSet:
    """A clock that moves when a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hand_set(monkeypatch: pytest.MonkeyPatch) -> HandSet:
    monkeypatch.setattr("dad_fast.engine.step_timer.time", found := HandSet())
    return found


def test_waiting_is_the_time_between_steps(hand_set):
    clock = StepTimer(torch.device("cpu"))
    clock.skip()
    for _ in range(3):
        hand_set.sleep(0.02)  # the wait for a batch
        with clock.step():
            hand_set.sleep(0.01)
    clock.count()
    window = clock.window()
    assert (
        window.steps == 3
        and window.seconds == pytest.approx(0.09)
        and window.waited == pytest.approx(0.06)
    )
    assert clock.total == pytest.approx(0.09)
    assert clock.window() == Window(0, 0.0, 0.0)


def test_runs_that_share_batches_divide_the_time(hand_set):
    clock = StepTimer(torch.device("cpu"), total=5.0)
    clock.shared_by = 4
    with clock.step():
        hand_set.sleep(2.0)
    clock.count()
    assert clock.total == pytest.approx(5.5) and clock.window().seconds == pytest.approx(2.0)


def test_skipped_time_is_not_counted(hand_set):
    clock = StepTimer(torch.device("cpu"), total=5.0)
    hand_set.sleep(0.05)
    clock.skip()
    with clock.step():
        hand_set.sleep(0.01)
    clock.count()
    assert clock.total == pytest.approx(5.01) and clock.window().waited == pytest.approx(
        0, abs=1e-9
    )


@pytest.mark.gpu
def test_waiting_on_a_gpu_is_the_gap_between_steps():
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    clock = StepTimer(device)

    def run(pause: float) -> Window:
        torch.cuda.synchronize()
        clock.skip()
        for _ in range(10):
            time.sleep(pause)
            with clock.step():
                for _ in range(5):
                    work @ work
        torch.cuda.synchronize()
        clock.count()
        return clock.window()

    run(0.0)  # warm-up
    busy, starved = run(0.0), run(0.05)
    assert busy.waited < 0.2 * busy.seconds and starved.waited > 0.4


def test_input_bound_run_gets_advice(monkeypatch):
    monkeypatch.setattr(clock_module, "usable_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    waits = Window(10, 2.0, 1.0)
    assert input_bound(Window(10, 2.0, 0.1), 100, 0, "torchvision", False) is None
    assert input_bound(Window(0, 0.0, 0.0), 100, 0, "torchvision", False) is None
    told = input_bound(waits, 100, 0, "torchvision", False)
    assert (
        told
        == "input-bound: 500 < 1,000 img/s, the rate of the steps alone; raise --workers (now 0; 4 cores)"
    )
    assert "raise --workers (now 3" in (input_bound(waits, 100, 3, "dali", True) or "")
    assert "--loader dali" in (input_bound(waits, 100, 4, "torchvision", True) or "")
    for loader, cuda in (("dali", True), ("torchvision", False)):  # on a CPU DALI is no faster
        told = input_bound(waits, 100, 4, loader, cuda)
        assert told is not None and "--loader dali" not in told


def test_cpu_without_an_idle_core_gets_no_advice(monkeypatch):
    """More loader processes would take the cores that the step computes on."""
    monkeypatch.setattr(clock_module, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert input_bound(Window(10, 2.0, 1.0), 100, 0, "torchvision", False) is None
    assert "raise --workers" in (
        input_bound(Window(10, 2.0, 1.0), 100, 0, "torchvision", True) or ""
    )


def test_runs_side_by_side_share_the_cores(monkeypatch):
    monkeypatch.setattr(cores, "num_cores", lambda: 8)
    monkeypatch.delenv(cores.SIDE_BY_SIDE, raising=False)
    assert (cores.side_by_side(), cores.usable_cores()) == (1, 8)
    for text, several, usable in (("3", 3, 2), ("16", 16, 1), ("0", 1, 8), ("many", 1, 8)):
        monkeypatch.setenv(cores.SIDE_BY_SIDE, text)
        assert (cores.side_by_side(), cores.usable_cores()) == (several, usable)
