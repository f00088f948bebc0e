"""Stage times and gaps from a labelled synthetic export of nsys and from traces of torch's
profiler.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from dad_fast.errors import DataError
from dad_fast.tools.profile.timeline import (
    OUTSIDE,
    Range,
    Timeline,
    Work,
    as_text,
    read_timeline,
    summarize,
)

ROOT = Path(__file__).parents[2]
MS = 1_000_000  # nanoseconds
PROCESS, MAIN, AUTOGRAD = 5 << 24, (5 << 24) + 1, (5 << 24) + 2
OTHER_PROCESS = 6 << 24

# Two steps of 10 ms. In each: the teacher's kernel (2 ms), a gap of 1 ms, the attack's backward
# kernel launched by another thread (3 ms), a copy outside every stage but `step` (0.5 ms).
RANGES = [
    ("step", 0, 10),
    ("teacher", 1, 4),
    ("attack", 4, 9),
    ("step", 10, 20),
    ("teacher", 11, 14),
    ("attack", 14, 19),
]
KERNELS = [  # name, launched at, by, correlation, start, end
    ("gemm", 1.5, MAIN, 1, 2, 4),
    ("conv_backward", 5, AUTOGRAD, 2, 5, 8),
    ("gemm", 11.5, MAIN, 3, 12, 14),
    ("conv_backward", 15, AUTOGRAD, 4, 15, 18),
]
COPIES = [(9.5, MAIN, 5, 9.5, 10), (19.5, MAIN, 6, 19.5, 20)]


def write_nsys(path: Path, *, with_strings: bool = True) -> Path:
    """Write an export like nsys: times in nanoseconds, some names in StringIds."""
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
    database.execute(
        "CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, text TEXT, textId INTEGER, globalTid INTEGER, eventType INTEGER)"
    )
    database.execute(
        "CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER, correlationId INTEGER)"
    )
    database.execute(
        "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, globalPid INTEGER, correlationId INTEGER, shortName INTEGER)"
    )
    database.execute(
        "CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER, end INTEGER, globalPid INTEGER, correlationId INTEGER)"
    )
    strings = {"gemm": 1, "conv_backward": 2, "teacher": 3}
    database.executemany(
        "INSERT INTO StringIds VALUES (?, ?)", [(number, text) for text, number in strings.items()]
    )
    for name, start, end in RANGES:
        named = (None, strings[name]) if name in strings and with_strings else (name, None)
        database.execute(
            "INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, 59)",
            (start * MS, end * MS, *named, MAIN),
        )
    database.execute("INSERT INTO NVTX_EVENTS VALUES (0, NULL, 'a mark', NULL, ?, 34)", (MAIN,))
    # On a thread that takes no steps.
    library = (
        1 * MS,
        19 * MS,
        "a library's range",
        None,
        AUTOGRAD,
        59,
    )
    database.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?)", library)
    for name, launched, thread, correlation, start, end in KERNELS:
        row = (int(launched * MS), int(launched * MS) + 1000, thread, correlation)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)", row)
        database.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?)",
            (start * MS, end * MS, PROCESS, correlation, strings[name]),
        )
    for launched, thread, correlation, start, end in COPIES:
        row = (int(launched * MS), int(launched * MS) + 1000, thread, correlation)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)", row)
        database.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, ?, ?)",
            (int(start * MS), int(end * MS), PROCESS, correlation),
        )
    # The same correlation number in another process, launched inside `teacher`, must not count.
    database.execute(
        "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)",
        (2 * MS, 3 * MS, OTHER_PROCESS + 1, 2),
    )
    database.commit()
    database.close()
    return path


def write_trace(path: Path) -> Path:
    """Write the same steps like torch's profiler: microseconds."""
    events = [
        {"ph": "X", "cat": "user_annotation", "name": n, "ts": s * 1e3, "dur": (e - s) * 1e3}
        for n, s, e in RANGES
    ]
    for name, launched, _, key, start, end in KERNELS:
        events.append(
            {
                "ph": "X",
                "cat": "cuda_runtime",
                "name": "l",
                "ts": launched * 1e3,
                "dur": 1,
                "args": {"correlation": key},
            }
        )
        span = {"ts": start * 1e3, "dur": (end - start) * 1e3}
        events.append(
            {"ph": "X", "cat": "kernel", "name": name, **span, "args": {"correlation": key}}
        )
    for launched, _, key, start, end in COPIES:
        events.append(
            {
                "ph": "X",
                "cat": "cuda_runtime",
                "name": "l",
                "ts": launched * 1e3,
                "dur": 1,
                "args": {"correlation": key},
            }
        )
        span = {"ts": start * 1e3, "dur": (end - start) * 1e3}
        events.append(
            {"ph": "X", "cat": "gpu_memcpy", "name": "memcpy", **span, "args": {"correlation": key}}
        )
    events.append(
        {
            "ph": "X",
            "cat": "user_annotation",
            "name": "Optimizer.step#AdamW.step",
            "ts": 3e3,
            "dur": 500,
        }
    )
    events.append({"ph": "i", "cat": "marker", "name": "x", "ts": 0})
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


@pytest.mark.parametrize("kind", ["nsys", "trace"])
def test_stage_times_and_gaps(tmp_path: Path, kind: str) -> None:
    path = (
        write_nsys(tmp_path / "p.sqlite")
        if kind == "nsys"
        else write_trace(tmp_path / "trace.json.gz")
    )
    summary = summarize(read_timeline(path))
    assert summary.steps == 2 and summary.calls == {"step": 2, "teacher": 2, "attack": 2}
    assert summary.device == pytest.approx({"teacher": 4e-3, "attack": 6e-3, "step": 1e-3})
    # The own time of a step excludes its stages.
    assert summary.host == pytest.approx({"teacher": 6e-3, "attack": 10e-3, "step": 4e-3})
    assert summary.kernels[:2] == [
        ("conv_backward", 2, pytest.approx(6e-3)),
        ("gemm", 2, pytest.approx(4e-3)),
    ]
    assert summary.busy == pytest.approx(11e-3) and summary.span == pytest.approx(18e-3)
    assert [(gap.after, gap.before) for gap in summary.gaps[:1]] == [
        ("step", "teacher")
    ] and summary.gaps[0].seconds == pytest.approx(2e-3)
    assert sum(gap.seconds for gap in summary.gaps) == pytest.approx(7e-3)
    text = as_text(summary)
    assert (
        "device idle 38.9%" in text
        and "2.000 ms  after step, before teacher" in text
        and "3.000 ms       1 x  conv_backward" in text
    )


def test_table_without_device_work() -> None:
    summary = summarize(Timeline([Range("step", 0.0, 1.0), Range("teacher", 0.25, 0.75)]))
    assert summary.host == {"step": 0.5, "teacher": 0.5} and summary.span == 1.0
    assert "device" not in as_text(summary)


def test_overlapping_work_and_work_without_a_launch() -> None:
    work = [Work("a", 0.0, 2.0, 0.0), Work("b", 1.0, 3.0, None), Work("c", 1.5, 1.6, 9.0)]
    summary = summarize(Timeline([Range("step", 0.0, 5.0)], work))
    assert (
        summary.busy == 3.0
        and not summary.gaps
        and summary.device == pytest.approx({"step": 2.0, OUTSIDE: 2.1})
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\x1f\x8bnothing",
        b"SQLite format 3\0" + b"x" * 200,
        b'{"traceEvents": [1]}',
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.sqlite"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.sqlite: neither") as error:
        read_timeline(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(bytes(1 << 21)),
        gzip.compress(b"[" * 100_000),
        b'{"traceEvents": ' + b"[" * 100_000,
    ],
)
def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Refuse decompression bombs: a gigabyte of zeros is a megabyte of gzip."""
    monkeypatch.setattr("dad_fast.tools.profile.timeline.MOST_BYTES", 1 << 20)
    (tmp_path / "p.json.gz").write_bytes(content)
    with pytest.raises(
        DataError, match=r"p\.json\.gz: neither .* \((ValueError: more than|RecursionError)"
    ):
        read_timeline(tmp_path / "p.json.gz")


def test_truncated_and_corrupted_files(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.json.gz").read_bytes()
    export = write_nsys(tmp_path / "whole.sqlite").read_bytes()
    for whole in (trace, export):
        for damaged in (whole[: len(whole) // 2], whole[:100] + bytes(60) + whole[160:], whole[:5]):
            path = tmp_path / "damaged"
            path.write_bytes(damaged)
            try:
                assert read_timeline(path).ranges is not None  # what was hit may be padding
            except DataError as error:
                assert "damaged: neither" in str(error) and "\n" not in str(error)


def test_an_export_without_a_column_is_named(tmp_path: Path) -> None:
    path = write_nsys(tmp_path / "p.sqlite")
    database = sqlite3.connect(path)
    database.execute("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL RENAME COLUMN globalPid TO pid")
    database.commit()
    database.close()
    with pytest.raises(DataError, match="neither an nsys export"):
        read_timeline(path)


def test_missing_files_and_empty_profiles_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_timeline(tmp_path / "none")
    report = tmp_path / "p.nsys-rep"
    report.touch()
    with pytest.raises(DataError, match="nsys export --type sqlite"):
        read_timeline(report)
    with pytest.raises(DataError, match="neither stages nor device work"):
        summarize(Timeline())


def test_an_export_is_only_read(tmp_path: Path) -> None:
    path = write_nsys(tmp_path / "with a space and a ?.sqlite")
    before = path.read_bytes()
    assert len(read_timeline(path).work) == 6
    assert path.read_bytes() == before


def test_the_script(tmp_path: Path) -> None:
    path = write_nsys(tmp_path / "p.sqlite", with_strings=False)
    script = [sys.executable, str(ROOT / "scripts" / "nsys_summary.py")]
    done = subprocess.run(
        [*script, str(path), "--json"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert (
        numbers["device"]["attack"] == pytest.approx(6e-3)
        and numbers["gaps"][0]["before"] == "teacher"
    )
    failed = subprocess.run([*script, "none.sqlite"], capture_output=True, text=True, cwd=tmp_path)
    assert (
        failed.returncode == 4
        and failed.stderr.startswith("nsys_summary: none.sqlite: no such file")
        and failed.stderr.count("\n") == 1
    )
