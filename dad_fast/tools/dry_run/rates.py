"""Time of operations by a model: the slower of arithmetic and memory, at rates of a table."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dad_fast.tools.dry_run.trace import PASS, Op, Trace

TABLE = Path(__file__).with_name("rates.toml")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of a GPU; see rates.toml for the units."""

    name: str
    source: str
    memory: float
    matmul: float
    conv: float
    attention: float
    float32: float
    passes: float
    layout: float
    link: float

    def milliseconds(self, op: Op) -> float:
        """Return the time of an operation in eager mode."""
        rate = self.float32
        if op.dtype in ("bfloat16", "float16"):
            rate = {"matmul": self.matmul, "conv": self.conv}.get(op.kind, self.attention)
        busy = max(op.flop / (rate * 1e9), self.passing(op.moved))
        return busy + self.passing(op.bias) + op.layout / (self.layout * 1e9)

    def passing(self, moved: float) -> float:
        """Return the milliseconds of moving so many bytes."""
        return moved / (self.passes * 1e9)

    def all_reduce(self, num_bytes: int, num_gpus: int) -> float:
        """Return the milliseconds of a sum over the GPUs of a node."""
        return 2 * num_bytes * (num_gpus - 1) / num_gpus / (self.link * 1e9)


def read_rates(path: Path = TABLE) -> list[Rates]:
    """Read the table."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Rates(name=name, **values) for name, values in tables.items()]


@dataclass(frozen=True)
class Cost:
    """Cost of a part of a step.

    flop, milliseconds. passed, layout: bytes of passes, and of copies between NCHW and NHWC.
    """

    flop: float
    milliseconds: float
    passed: float
    layout: float

    def times(self, factor: float) -> Cost:
        """Return the cost of `factor` of these."""
        values = (self.flop, self.milliseconds, self.passed, self.layout)
        return Cost(*(factor * value for value in values))


def cost(ops: Sequence[Op], rates: Rates, compiled: bool, later: Trace) -> Cost:
    """Return the cost of consecutive operations.

    compiled: passes between two matrix products are one kernel. later: the trace of the whole step,
    which knows what is read afterwards.
    """
    flop = sum(op.flop for op in ops)
    layout = sum(op.layout for op in ops)
    if not compiled:
        passed = sum(op.moved * (op.kind == PASS) + op.bias for op in ops)
        return Cost(flop, sum(map(rates.milliseconds, ops)), passed, layout)
    busy = [op for op in ops if op.kind != PASS]
    moved = fused_bytes(ops, later)
    passed = moved + sum(op.bias for op in ops)
    milliseconds = sum(map(rates.milliseconds, busy)) + rates.passing(moved)
    rest = sum(op.layout for op in ops if op.kind == PASS)
    return Cost(flop, milliseconds + rest / (rates.layout * 1e9), passed, layout)


def fused_bytes(ops: Sequence[Op], trace: Trace) -> int:
    """Return the bytes of passes if each run of them between two matrix products is one kernel.

    It reads what it did not write itself, and writes what others read or what remains.
    """
    last_read: dict[int, int] = {}
    position = {id(op): i for i, op in enumerate(trace.ops)}
    for i, op in enumerate(trace.ops):
        for number in op.reads:
            last_read[number] = i
    total = 0
    for group in _runs(ops):
        end = position[id(group[-1])]
        own: dict[int, int] = {}
        outside: dict[int, int] = {}
        for op in group:
            for number, count in op.reads.items():
                if number not in own:
                    outside[number] = max(count, outside.get(number, 0))
            own |= op.writes
        total += sum(outside.values())
        total += sum(
            count
            for number, count in own.items()
            if last_read.get(number, -1) > end or number in trace.kept
        )
    return total


def _runs(ops: Iterable[Op]) -> list[list[Op]]:
    """Split into runs of passes; layout copies and matrix products end one."""
    groups: list[list[Op]] = [[]]
    for op in ops:
        if op.kind == PASS and not op.layout:
            groups[-1].append(op)
        elif groups[-1]:
            groups.append([])
    return [group for group in groups if group]
