"""Where the time of a profile went: stage times and gaps, from an nsys export (SQLite) or a trace of torch's profiler (JSON).

Device work belongs to the innermost range in which it was launched, whichever thread launched it: the backward pass runs on threads of
its own while the range's thread waits. A stage's host time is its own, without the ranges inside it. Times are seconds.
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
MOST_BYTES = 1 << 30  # of a trace, unpacked: a small file could hold any number
NSYS_WORK = ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE")  # what runs on the device, by table


class Range(NamedTuple):
    name: str
    start: float
    end: float
    thread: int = 0


class Work(NamedTuple):
    """Something the device did, and when the host launched it (None where the profile does not say)."""

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
    after: str  # the stage whose work came before the gap
    before: str


@dataclass
class Summary:
    steps: int  # ranges called `step`; 1 where there are none
    calls: dict[str, int]
    host: dict[str, float]  # by stage, over all steps
    device: dict[str, float]
    kernels: list[tuple[str, int, float]]  # name, launches, seconds; the most costly first
    busy: float  # seconds in which the device did anything
    span: float  # from the first to the last device work, or of all ranges where there is none
    gaps: list[Gap]  # the longest first


def summarize(timeline: Timeline, shortest_gap: float = 5e-6) -> Summary:
    """DataError for a timeline with neither ranges nor device work."""
    if not timeline.ranges and not timeline.work:
        raise DataError(
            "the profile holds neither stages nor device work; was the captured range entered?"
        )
    stepping = {
        r.thread for r in timeline.ranges if r.name == "step"
    }  # libraries put ranges of their own on other threads
    ranges = sorted(
        (r for r in timeline.ranges if not stepping or r.thread in stepping),
        key=lambda r: (r.start, -r.end),
    )
    owner = _Innermost(ranges)
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
    busy, gaps, last_end, last_stage = 0.0, [], None, OUTSIDE
    for work, stage in placed:
        if last_end is not None and work.start - last_end >= shortest_gap:
            gaps.append(Gap(work.start - last_end, last_stage, stage))
        begin = work.start if last_end is None else max(work.start, last_end)
        busy += max(0.0, work.end - begin)
        if last_end is None or work.end > last_end:
            last_end, last_stage = work.end, stage
    edges: Sequence[Any] = timeline.work or timeline.ranges
    span = max(edge.end for edge in edges) - min(edge.start for edge in edges)
    kernels = sorted(
        ((name, int(count), seconds) for name, (count, seconds) in totals.items()),
        key=lambda row: -row[2],
    )
    gaps.sort(key=lambda gap: -gap.seconds)
    return Summary(
        calls.get("step", 1), dict(calls), dict(host), dict(device), kernels, busy, span, gaps
    )


class _Innermost:
    """The innermost of nested ranges at a time; of ranges on several threads, the one that began last."""

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
    """The summary as aligned text, per step."""
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
            whole = sum(times.values())
            cells += f" {1e3 * times.get(name, 0.0) / steps:9.3f} {times.get(name, 0.0) / whole if whole else 0.0:6.1%}"
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
    """From nsys's SQLite export, or a JSON trace of torch's profiler (.json, .json.gz). DataError, naming the file, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; name an export of nsys (nsys export --type sqlite FILE.nsys-rep) or a trace.json.gz"
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
            f"{path}: neither an nsys export nor a trace of torch's profiler ({type(error).__name__}: {error})"
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
                launches[row["globalTid"] >> 24, row["correlationId"]] = (
                    row["start"] / 1e9
                )  # the low 24 bits are the thread's
        work = []
        for kind in NSYS_WORK:
            table = f"CUPTI_ACTIVITY_KIND_{kind}"
            for row in database.execute(f"SELECT * FROM {table}") if table in tables else ():
                columns = row.keys()
                label = (
                    strings.get(row["shortName"], "?")
                    if "shortName" in columns
                    else kind.lower().replace("_trace", "")
                )
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
        kind, start = event.get("cat"), float(event["ts"]) / 1e6
        end = start + float(event.get("dur", 0)) / 1e6
        if kind == "user_annotation" and not event["name"].startswith(
            ("ProfilerStep", "Optimizer.")
        ):  # torch's own
            ranges.append(Range(event["name"], start, end, hash(event.get("tid"))))
        elif kind in ("cuda_runtime", "cuda_driver"):
            launches[event["args"].get("correlation")] = start
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            work.append((event["name"], start, end, event["args"].get("correlation")))
    return Timeline(
        ranges, [Work(name, start, end, launches.get(key)) for name, start, end, key in work]
    )
