"""The `bench` fixture: time named functions against each other and record the results."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Machine
from benchmarks.record import Record, make_record, record_path, write_record
from benchmarks.timing import (
    Function,
    graphed,
    interleaved,
    joules_per_call,
    peak_memory,
    peaks,
    reset_peaks,
    spread,
)

# Limit per comparison at size tiny, which also takes a third of the requested time: all groups take
# minutes on two cores.
TINY_SECONDS = 4.0


def default_size(device: torch.device) -> str:
    """Return tiny on a CPU, paper with at least 60 GiB of GPU memory, base otherwise."""
    if device.type == "cpu":
        return "tiny"
    memory = torch.cuda.get_device_properties(device).total_memory
    return "paper" if memory >= 60 * 2**30 else "base"


class Session:
    """All comparisons of one pytest session, by group.

    out         folder of the records, or None to write none
    batch_size  of the groups steps and stored; 0 = each group's own
    rounds      rounds of every comparison, without the energy; 0 = by time
    """

    def __init__(
        self,
        device: torch.device,
        size: str,
        out: Path | None = None,
        batch_size: int = 0,
        rounds: int = 0,
    ) -> None:
        self.device, self.size, self.out = device, size, out
        self.batch_size = batch_size
        self.rounds = rounds
        self.machine = Machine(device)
        self.groups: dict[str, list[Record]] = {}
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def write(self) -> list[Record]:
        """Write the current records and return them.

        Called after every comparison, so a stopped session keeps its results.
        """
        machine = self.machine.describe()
        records = [
            make_record(group, self.size, rows, machine, self.seconds)
            for group, rows in self.groups.items()
        ]
        if self.out is not None:
            for record in records:
                write_record(record_path(self.out, record, self.machine.slug), record)
        return records


def timed_row(name: str, times: Sequence[float], baseline: Sequence[float], work: float) -> Record:
    """Return a record's row from seconds per call of a function and of the baseline, in the same
    order of rounds.
    """
    seconds = spread(times)
    return {
        "name": name,
        "ms": {key: value if key == "n" else value * 1e3 for key, value in seconds.items()},
        "ratio": spread([own / base for own, base in zip(times, baseline, strict=True)]),
        "per_second": work / seconds["median"],
    }


class Bench:
    """Device, size and `compare` for one benchmark."""

    def __init__(self, session: Session, group: str) -> None:
        self.session, self.group = session, group
        self.device, self.size = session.device, session.size

    def add(
        self,
        name: str,
        rows: Sequence[Record],
        *,
        baseline: str,
        work: float,
        unit: str = "img",
        config: Mapping[str, Any] | None = None,
        graph: bool = False,
        memory: Mapping[str, float] | None = None,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        """Add a comparison that was measured elsewhere, and write the records."""
        comparison = {
            "name": name,
            "unit": unit,
            "work": work,
            "baseline": baseline,
            "config": dict(config or {}),
            "graph": graph,
            "rows": list(rows),
        }
        if memory:
            comparison["memory"] = dict(memory)
        if left_out:
            comparison["left_out"] = dict(left_out)
        self.session.groups.setdefault(self.group, []).append(comparison)
        self.session.write()

    def compare(
        self,
        name: str,
        functions: Mapping[str, Function],
        *,
        baseline: str,
        work: float,
        unit: str = "img",
        config: Mapping[str, Any] | None = None,
        predicted: Mapping[str, float] | None = None,
        flops: Mapping[str, float] | None = None,
        notes: Mapping[str, str] | None = None,
        graph: bool = False,
        energy: bool = False,
        seconds: float = 10.0,
    ) -> dict[str, float]:
        """Time `functions` (no arguments, equal amounts of `work`) in turns and record them under
        `name`.

        baseline    the function that ratios refer to
        work, unit  the work of one call for the rate, such as 256 "img"
        config      facts about the inputs (plain values, no paths)
        predicted   expected ratios to the baseline
        flops       FLOP per `unit`, counted before measuring: gives TFLOP/s, and predicts ratios
                    missing in `predicted`
        notes       a remark per function
        graph       on a GPU, time the replay of a CUDA graph of each function
        energy      on a GPU, measure joules per `unit` over a block of calls
        seconds     limit of all rounds together (at least 5 rounds run); --bench-rounds overrides it

        Returns the median ratio of each function to the baseline over rounds. A failing function is
        left out by name, and the test fails after the others are recorded; a function that runs out
        of device memory is left out without failing the test.
        """
        if baseline not in functions:
            raise ValueError(f"baseline {baseline!r} is none of {', '.join(functions)}")
        graph = graph and self.device.type == "cuda"
        if self.size == "tiny":
            seconds = min(seconds / 3, TINY_SECONDS)
        reset_peaks(self.device)
        timed, left_out, failures = {}, {}, {}
        for key, function in functions.items():
            try:
                ready = graphed(function) if graph else function
                ready()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                timed[key] = ready
            except Exception as error:
                if key == baseline:
                    raise
                left_out[key] = reason(error)
                if not isinstance(error, torch.OutOfMemoryError):
                    traceback.print_exc(file=sys.stdout)
                    # The frames of the traceback hold the function's tensors.
                    failures[key] = error.with_traceback(None)
        rounds = self.session.rounds
        times = interleaved(timed, self.device, seconds, rounds)
        memory = peaks(self.device)
        gpu = self.session.machine.gpu
        rows = []
        for key, function in timed.items():
            row = timed_row(key, times[key], times[baseline], work)
            if predicted and key in predicted:
                row["predicted"] = predicted[key]
            if flops and key in flops:
                row["tflops"] = row["per_second"] * flops[key] / 1e12
                if baseline in flops:
                    row.setdefault("predicted", flops[key] / flops[baseline])
            if notes and key in notes:
                row["note"] = notes[key]
            peak = peak_memory(function, self.device)
            if peak is not None and not graph:  # a graph's memory was taken at capture
                row["peak_bytes"] = peak
            if energy and gpu is not None and not rounds:
                joules = joules_per_call(function, self.device, gpu.energy_joules)
                if joules is not None:
                    row["joules"] = joules / work
            rows.append(row)
        self.add(
            name,
            rows,
            baseline=baseline,
            work=work,
            unit=unit,
            config=config,
            graph=graph,
            memory=memory,
            left_out=left_out,
        )
        if failures:
            key, cause = next(iter(failures.items()))
            raise RuntimeError(
                f"{name}: not measured: {', '.join(failures)}; {key}: {left_out[key]}"
            ) from cause
        return {row["name"]: row["ratio"]["median"] for row in rows}


def reason(error: Exception) -> str:
    """Return one line of an error for a record."""
    message = (str(error).strip() or "no message").splitlines()[0][:300]
    return f"{type(error).__name__}: {message}"
