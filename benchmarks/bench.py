"""The `bench` fixture: times named functions against each other and keeps what a record needs."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Machine
from benchmarks.record import Record, make_record, record_path, write_record
from benchmarks.timing import Function, graphed, interleaved, joules_per_call, peak_memory, spread

TINY_SECONDS = 4.0  # of a comparison at most, and a third of what it asks for: all groups together take minutes on two cores


def default_size(device: torch.device) -> str:
    """tiny on a CPU, paper from 60 GiB of GPU memory on, base below."""
    if device.type == "cpu":
        return "tiny"
    return (
        "paper" if torch.cuda.get_device_properties(device).total_memory >= 60 * 2**30 else "base"
    )


class Session:
    """All comparisons of one pytest session, by group. `out` is the folder of their records; None: they are not written."""

    def __init__(self, device: torch.device, size: str, out: Path | None = None) -> None:
        self.device, self.size, self.out = device, size, out
        self.machine = Machine(device)
        self.groups: dict[str, list[Record]] = {}
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def write(self) -> list[Record]:
        """The records as they stand: after every comparison, so that a session that is stopped leaves what it measured."""
        machine = self.machine.describe()
        records = [
            make_record(group, self.size, rows, machine, self.seconds)
            for group, rows in self.groups.items()
        ]
        if self.out is not None:
            for record in records:
                write_record(record_path(self.out, record, self.machine.slug), record)
        return records


class Bench:
    """What a benchmark gets: the device, the size, and `compare`."""

    def __init__(self, session: Session, group: str) -> None:
        self.session, self.group = session, group
        self.device, self.size = session.device, session.size

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
        """Time `functions` (no arguments; all do the same amount of `work`) in turns and record them under `name`.

        baseline: the one that ratios refer to. work, unit: what one call does, such as 256 "img", for the rate.
        config: what the record must say about the inputs (plain values, no paths). predicted: expected ratios to the baseline.
        flops: FLOP per `unit`, counted before measuring: gives TFLOP/s, and predicts ratios where `predicted` does not.
        notes: a remark per function. graph: on a GPU, time the replay of a CUDA graph of each function. energy: on a GPU, joules per
        `unit` over a block of calls. seconds: what the rounds together may take (at least 5 rounds are made).

        Returns the median ratio of each function to the baseline, over rounds. A function that fails is left out by name, and the
        test fails when the others are recorded; one that does not fit into the device's memory is left out without that.
        """
        if baseline not in functions:
            raise ValueError(f"baseline {baseline!r} is none of {', '.join(functions)}")
        graph = graph and self.device.type == "cuda"
        if self.size == "tiny":
            seconds = min(seconds / 3, TINY_SECONDS)
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
                left_out[key] = (
                    f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
                )
                if not isinstance(error, torch.OutOfMemoryError):
                    traceback.print_exc(file=sys.stdout)
                    failures[key] = error.with_traceback(
                        None
                    )  # whose frames hold the function's tensors
        times = interleaved(timed, self.device, seconds)
        rows, ratios = [], {}
        for key, function in timed.items():
            ratio = spread(
                [own / base for own, base in zip(times[key], times[baseline], strict=True)]
            )
            ratios[key] = ratio["median"]
            row: Record = {
                "name": key,
                "ms": {k: v if k == "n" else v * 1e3 for k, v in spread(times[key]).items()},
                "ratio": ratio,
            }
            row["per_second"] = work / spread(times[key])["median"]
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
            gpu = self.session.machine.gpu
            if energy and gpu is not None:
                joules = joules_per_call(function, self.device, gpu.energy_joules)
                if joules is not None:
                    row["joules"] = joules / work
            rows.append(row)
        comparison = {
            "name": name,
            "unit": unit,
            "work": work,
            "baseline": baseline,
            "config": dict(config or {}),
            "graph": graph,
        }
        comparison |= {"rows": rows} | ({"left_out": left_out} if left_out else {})
        self.session.groups.setdefault(self.group, []).append(comparison)
        self.session.write()
        if failures:
            key, cause = next(iter(failures.items()))
            raise RuntimeError(
                f"{name}: not measured: {', '.join(failures)}; {key}: {left_out[key]}"
            ) from cause
        return ratios
