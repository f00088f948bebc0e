"""Time several functions in turns, so that drifts of the machine (clocks, heat, other work) affect
all of them alike.

A round calls every function once (short ones several times); each round starts with another
function. CPU times are wall-clock times. GPU times are device events around each call, after a
flush of the L2 cache; the host waits once per round.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 50
# Per function, with a minimum number of calls: allocator, caches, compilation, capture, clocks.
WARM_UP_SECONDS = 0.2
WARM_UP_CALLS = {"cpu": 2, "cuda": 5}
LONG_SECONDS = 5.0  # a function that takes so long on a CPU is warm and timed after one call each
BLOCK_SECONDS = 0.01  # a function shorter than this is called several times per round
MAX_CALLS = 1000  # per round

Function = Callable[[], object]


def interleaved(
    functions: Mapping[str, Function], device: torch.device, seconds: float, rounds: int = 0
) -> dict[str, list[float]]:
    """Return seconds per call of each function, a value per round, in the order of the rounds.

    seconds  target time of all rounds together (at least MIN_ROUNDS)
    rounds   number of rounds, whatever their time; 0 = by `seconds`
    """
    timer = _EventTimer(device) if device.type == "cuda" else _wall_time
    names = list(functions)
    calls, round_seconds = {}, 0.0
    for name, function in functions.items():
        _warm_up(function, device)
        estimate = timer(function, 1)
        if estimate < LONG_SECONDS:
            estimate = min(estimate, timer(function, 1))
        calls[name] = max(1, min(MAX_CALLS, math.ceil(BLOCK_SECONDS / max(estimate, 1e-9))))
        round_seconds += estimate * calls[name]
    rounds = rounds or max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / round_seconds)))
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(timer(functions[name], calls[name]))
    finally:
        gc.enable()
    return times


def graphed(function: Function) -> Function:
    """Capture one call as a CUDA graph and return its replay; `function` must use the same memory
    in each call.
    """
    from dad_fast.engine.cuda_graph import capturing

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, torch.cuda.graph_pool_handle(), stream):
        keep = function()  # its result lives in the graph's memory

    def replay() -> object:
        graph.replay()
        return keep

    return replay


def peak_memory(function: Function, device: torch.device) -> int | None:
    """Return the bytes that one call allocates at its peak, from torch's caching allocator; None on
    a CPU.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process since `reset_peaks`, in GiB; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2),
    }


def joules_per_call(
    function: Function,
    device: torch.device,
    read_joules: Callable[[], float | None],
    seconds: float = 2.0,
) -> float | None:
    """Return the energy of the board per call, over a block of about `seconds`; None if the board
    does not count it.
    """
    torch.cuda.synchronize(device)
    start, before, count = time.perf_counter(), read_joules(), 0
    while time.perf_counter() - start < seconds:
        function()
        torch.cuda.synchronize(device)
        count += 1
    after = read_joules()
    return None if before is None or after is None else (after - before) / count


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return {median, q1, q3, min, n} of `values`."""
    if len(values) == 1:
        quartiles = [values[0]] * 3
    else:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": quartiles[1],
        "q1": quartiles[0],
        "q3": quartiles[2],
        "min": min(values),
        "n": len(values),
    }


def _warm_up(function: Function, device: torch.device) -> None:
    start, count = time.perf_counter(), 0
    while count < WARM_UP_CALLS[device.type] or time.perf_counter() - start < WARM_UP_SECONDS:
        function()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif time.perf_counter() - start > LONG_SECONDS:
            break


def _wall_time(function: Function, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


class _EventTimer:
    """Mean device time of a call.

    The flush between calls also lets the host queue the next call.
    """

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * cache_bytes, dtype=torch.int8, device=device)
        self.device = device

    def __call__(self, function: Function, calls: int) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * calls)]
        pairs = list(zip(events[::2], events[1::2], strict=True))
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.fmean(start.elapsed_time(end) for start, end in pairs) / 1e3
