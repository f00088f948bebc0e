"""Stage times and gaps of a profile, from an nsys export (SQLite) or a trace of torch's profiler
(JSON).

Own code, because the NVTX reports of `nsys stats` assign work to ranges of the launching thread
(the backward pass has threads of its own), name no stage around a gap, and do not read torch's
traces.

Device work belongs to the innermost range that was open when any thread launched it. The host time
of a stage excludes the ranges inside it. Times are seconds.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dad_fast.errors import DataError

OUTSIDE = "(no stage)"
MOST_BYTES = 1 << 30  # of an unpacked trace; guards against decompression bombs
NSYS_WORK = ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE")  # tables of device work


class Range(NamedTuple):
    name: str
    start: float
    end: float
    thread: int = 0


class Work(NamedTuple):
    """One operation of the device, and the time of its launch on the host (None if not recorded)."""

    name: str
    start: float
    end: float
    launched: float | None


@dataclass
class Timeline:
    ranges: list[Range] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)


class Gap(NamedTuple):
    seconds: float
    after: str  # stage of the work before the gap
    before: str


@dataclass
class Summary:
    steps: int  # number of `step` ranges; 1 if there are none
    calls: dict[str, int]
    host: dict[str, float]  # by stage, over all steps
    device: dict[str, float]
    kernels: list[tuple[str, int, float]]  # name, launches, seconds; longest time first
    busy: float  # seconds in which the device worked
    span: float  # from the first to the last device work; of all ranges without device work
    gaps: list[Gap]  # longest first


def summarize(timeline: Timeline, shortest_gap: float = 5e-6) -> Summary:
    """Sum a timeline up by stage. Raises DataError if it has neither ranges nor device work."""
    if not timeline.ranges and not timeline.work:
        raise DataError(
            "the profile holds neither stages nor device work; was the captured range entered?"
        )

    # Libraries put ranges of their own on other threads.
    stepping = {r.thread for r in timeline.ranges if r.name == "step"}
    of_steps = (r for r in timeline.ranges if not stepping or r.thread in stepping)
    ranges = sorted(of_steps, key=lambda r: (r.start, -r.end))
    calls, host = _host_times(ranges)

    owner = _Innermost(ranges)
    device: dict[str, float] = defaultdict(float)
    totals: dict[str, list[float]] = {}
    placed = []
    for work in sorted(timeline.work, key=lambda w: w.start):
        stage = owner.at(work.launched) if work.launched is not None else OUTSIDE
        device[stage] += work.end - work.start
        count_and_time = totals.setdefault(work.name, [0, 0.0])
        count_and_time[0] += 1
        count_and_time[1] += work.end - work.start
        placed.append((work, stage))
    busy, gaps = _busy_and_gaps(placed, shortest_gap)

    edges: Sequence[Any] = timeline.work or timeline.ranges
    span = max(edge.end for edge in edges) - min(edge.start for edge in edges)
    kernels = [(name, int(count), seconds) for name, (count, seconds) in totals.items()]
    kernels.sort(key=lambda row: -row[2])
    return Summary(calls.get("step", 1), calls, host, dict(device), kernels, busy, span, gaps)


def _host_times(ranges: Sequence[Range]) -> tuple[dict[str, int], dict[str, float]]:
    """Return calls and own host seconds by stage, from ranges sorted by start."""
    calls: dict[str, int] = defaultdict(int)
    host: dict[str, float] = defaultdict(float)
    stack: list[Range] = []
    for current in ranges:
        while stack and stack[-1].end <= current.start:
            stack.pop()
        calls[current.name] += 1
        host[current.name] += current.end - current.start
        if stack and current.end <= stack[-1].end:
            host[stack[-1].name] -= current.end - current.start
        stack.append(current)
    return dict(calls), dict(host)


def _busy_and_gaps(
    placed: Sequence[tuple[Work, str]], shortest_gap: float
) -> tuple[float, list[Gap]]:
    """Return the seconds in which the device worked, and the gaps, longest first.

    `placed`: work by start, with its stage.
    """
    busy = 0.0
    gaps: list[Gap] = []
    last_end: float | None = None
    last_stage = OUTSIDE
    for work, stage in placed:
        if last_end is not None and work.start - last_end >= shortest_gap:
            gaps.append(Gap(work.start - last_end, last_stage, stage))
        begin = work.start if last_end is None else max(work.start, last_end)
        busy += max(0.0, work.end - begin)
        if last_end is None or work.end > last_end:
            last_end, last_stage = work.end, stage
    gaps.sort(key=lambda gap: -gap.seconds)
    return busy, gaps


class _Innermost:
    """Look-up of the innermost range at a time; of ranges on several threads, the one with the
    latest start.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        self.starts = [r.start for r in ranges]
        self.ranges = ranges
        self.parents: list[int] = []
        stack: list[int] = []
        for i, current in enumerate(ranges):
            while stack and ranges[stack[-1]].end <= current.start:
                stack.pop()
            self.parents.append(stack[-1] if stack else -1)
            stack.append(i)

    def at(self, time: float) -> str:
        i = bisect_right(self.starts, time) - 1
        while i >= 0 and self.ranges[i].end < time:
            i = self.parents[i]
        return self.ranges[i].name if i >= 0 else OUTSIDE


def as_text(summary: Summary, top: int = 10) -> str:
    """Format the summary as aligned text, per step."""
    steps = summary.steps
    names = sorted(
        summary.host.keys() | summary.device.keys(),
        key=lambda n: (-summary.device.get(n, 0.0), -summary.host.get(n, 0.0)),
    )
    columns = [("device", summary.device)] if summary.kernels else []
    columns.append(("host", summary.host))
    width = max(24, *(len(name) for name in names))
    heads = "".join(f" {head:>9} {'share':>6}" for head, _ in columns)
    lines = [f"{steps} steps; milliseconds per step", f"{'stage':{width}} {'calls':>6}{heads}"]
    for name in names:
        cells = ""
        for _, times in columns:
            seconds, whole = times.get(name, 0.0), sum(times.values())
            share = seconds / whole if whole else 0.0
            cells += f" {1e3 * seconds / steps:9.3f} {share:6.1%}"
        lines.append(f"{name:{width}} {summary.calls.get(name, 0) / steps:6g}{cells}")
    if summary.kernels:
        idle = 1 - summary.busy / summary.span if summary.span else 0.0
        lines += [
            "",
            f"device idle {idle:.1%} of {1e3 * summary.span / steps:.3f} ms per step; longest gaps:",
        ]
        lines += [
            f"  {1e3 * gap.seconds:9.3f} ms  after {gap.after}, before {gap.before}"
            for gap in summary.gaps[:5]
        ] or ["  none"]
        lines += ["", "most costly device work (per step):"]
        lines += [
            f"  {1e3 * seconds / steps:9.3f} ms  {count / steps:6g} x  {name[:90]}"
            for name, count, seconds in summary.kernels[:top]
        ]
    return "\n".join(lines)


def read_timeline(path: str | Path) -> Timeline:
    """Read nsys's SQLite export or a trace of torch's profiler (.json, .json.gz).

    Raises DataError for other files.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; name an export of nsys (nsys export --type sqlite "
            "FILE.nsys-rep) or a trace.json.gz"
        )
    if path.suffix == ".nsys-rep":
        raise DataError(f"{path}: export it first: nsys export --type sqlite {path}")
    with path.open("rb") as file:
        is_sqlite = file.read(16) == b"SQLite format 3\0"
    try:
        return _read_nsys(path) if is_sqlite else _read_trace(path)
    except (
        sqlite3.Error,
        zlib.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        OSError,
        RecursionError,
    ) as error:
        raise DataError(
            f"{path}: neither an nsys export nor a trace of torch's profiler "
            f"({type(error).__name__}: {error})"
        ) from None


def _read_nsys(path: Path) -> Timeline:
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as database:
        database.row_factory = sqlite3.Row
        tables = {
            row["name"]
            for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        if "StringIds" not in tables:
            raise ValueError("it has no table StringIds")
        strings = {
            row["id"]: row["value"] for row in database.execute("SELECT id, value FROM StringIds")
        }
        ranges = []
        if "NVTX_EVENTS" in tables:
            for row in database.execute("SELECT * FROM NVTX_EVENTS WHERE end IS NOT NULL"):
                name = row["text"] or strings.get(row["textId"], "")
                ranges.append(Range(name, row["start"] / 1e9, row["end"] / 1e9, row["globalTid"]))
        launches = {}
        if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
            for row in database.execute(
                "SELECT start, correlationId, globalTid FROM CUPTI_ACTIVITY_KIND_RUNTIME"
            ):
                # The low 24 bits are the thread's.
                launches[row["globalTid"] >> 24, row["correlationId"]] = row["start"] / 1e9
        work = []
        for kind in NSYS_WORK:
            table = f"CUPTI_ACTIVITY_KIND_{kind}"
            for row in database.execute(f"SELECT * FROM {table}") if table in tables else ():
                label = kind.lower().replace("_trace", "")
                if "shortName" in row.keys():  # `in row` searches the values
                    label = strings.get(row["shortName"], "?")
                launched = launches.get((row["globalPid"] >> 24, row["correlationId"]))
                work.append(Work(label, row["start"] / 1e9, row["end"] / 1e9, launched))
    return Timeline(ranges, work)


def _read_trace(path: Path) -> Timeline:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    events: Iterable[dict[str, Any]] = json.loads(data)["traceEvents"]
    complete = [event for event in events if event.get("ph") == "X"]
    launches, ranges, work = {}, [], []
    for event in complete:
        kind = event.get("cat")
        start = float(event["ts"]) / 1e6
        end = start + float(event.get("dur", 0)) / 1e6
        if kind == "user_annotation":
            of_torch = event["name"].startswith(("ProfilerStep", "Optimizer."))
            if not of_torch:
                ranges.append(Range(event["name"], start, end, hash(event.get("tid"))))
        elif kind in ("cuda_runtime", "cuda_driver"):
            launches[event["args"].get("correlation")] = start
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            work.append((event["name"], start, end, event["args"].get("correlation")))
    return Timeline(
        ranges, [Work(name, start, end, launches.get(key)) for name, start, end, key in work]
    )
