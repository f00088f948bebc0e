"""Logs, atomic files, progress."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dad_fast import files
from dad_fast.loggers import progress
from dad_fast.loggers import run_log as runlog
from dad_fast.loggers.progress import TrainProgress
from dad_fast.loggers.run_log import RunLog, read_metrics
from tests.processes import wait_until


def test_atomic_write_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.atomic_write_json(
        path, {"x": 1.5, "bad": float("nan"), "path": path, "list": (1, float("-inf"))}
    )
    assert json.loads(path.read_text()) == {
        "x": 1.5,
        "bad": "nan",
        "path": str(path),
        "list": [1, "-inf"],
    }
    files.atomic_write_text(path, "ü")
    assert path.read_text() == "ü" and os.listdir(path.parent) == ["a.json"]


def test_json_holds_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xe2\x82\xac")
    files.atomic_write_json(tmp_path / "x.json", {name: [name, "caf\u00e9"]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {
        name: [name, "caf\u00e9"]
    }


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.atomic_write_text(path, "old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_plain_reads_scalars_of_arrays_and_tensors():
    torch = pytest.importorskip("torch")
    value = files.plain(
        {1: torch.tensor(2.5), "n": torch.tensor(float("inf")), "flag": True, "none": None}
    )
    assert value == {"1": 2.5, "n": "inf", "flag": True, "none": None}


def test_metrics_are_valid_json_lines_and_resume_is_exact(tmp_path):
    with RunLog(tmp_path, echo=lambda line: None) as log:
        log.metrics("train", step=1, loss=float("nan"))
        offset = log.offset()
        log.metrics("train", step=2, loss=0.5)
        log.metrics("val", step=2, top1=91.0)
    assert offset == (tmp_path / "metrics.jsonl").read_bytes().index(b"\n") + 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 2]
    with RunLog(tmp_path, echo=lambda line: None) as log:
        log.truncate_to(offset)
        log.metrics("train", step=2, loss=0.25)
    rows = read_metrics(tmp_path, "train")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, "nan"), (2, 0.25)]


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b"\0\0\0"])
def test_incomplete_last_line_is_dropped(tmp_path, torn):
    with RunLog(tmp_path) as log:
        log.metrics("train", step=1)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert len(read_metrics(tmp_path)) == 1
    with RunLog(tmp_path) as log:
        log.metrics("train", step=2)
        log.truncate_to(
            10**9
        )  # a checkpoint that knows of more lines than the file has: nothing is padded
        log.metrics("train", step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_kill_nine_leaves_whole_lines(tmp_path):
    code = f"""
from dad_fast.loggers.run_log import RunLog
log = RunLog({str(tmp_path)!r}, echo=lambda line: None)
step = 0
while True:
    log.metrics("train", step=step, loss=0.1); step += 1
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    path = tmp_path / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.stat().st_size > 10_000)
    process.kill()
    process.wait()
    RunLog(tmp_path).close()
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert len(steps) > 50 and steps == list(range(len(steps)))


def test_progress_without_a_terminal_writes_plain_lines(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with RunLog(tmp_path, echo=lines.append) as log:
        with TrainProgress(10, 32, 5, "dad seed 0", log, start_step=4, live=False) as bar:
            for step in range(4, 10):
                bar.tick()
                if step % 3 == 0:
                    bar.update({"loss": 1.23456, "data_wait": 0.031, "gpu_memory": 12.14})
        assert bar.images_per_second > 0
    assert len(lines) == 2
    assert lines[0].startswith("dad seed 0  epoch 2/2  step 7/10  ") and lines[0].endswith(
        "loss 1.23  data wait 3 %  12.1 GiB"
    )
    assert "img/s" in lines[1] and "0:00 left" in lines[1]
    assert (tmp_path / "train.log").read_text().count("\n") == 2


def test_live_bar_shows_values_and_lines_above_it(tmp_path, monkeypatch):
    console = pytest.importorskip("rich.console")
    shown = io.StringIO()
    terminal = console.Console(file=shown, force_terminal=True, width=150)
    monkeypatch.setattr(console, "Console", lambda stderr: terminal)
    with RunLog(tmp_path) as log:
        before = log.echo
        with TrainProgress(4, 8, 2, "kd [seed] 0", log, live=True) as bar:
            for _ in range(4):
                bar.tick()
                bar.update({"loss": 0.5})
            log.say("[note] checkpoint saved")
            bar.evaluating("optdigits")(3, 9)
        assert log.echo is before
    text = shown.getvalue()
    assert (
        "kd [seed] 0" in text
        and "4/4" in text
        and "[note] checkpoint saved" in text
        and "evaluating optdigits 3/9" in text
    )
    assert "checkpoint saved" in (tmp_path / "train.log").read_text()


def test_format_seconds():
    assert [progress.format_seconds(s) for s in (7.2, 750, 11045)] == ["0:07", "12:30", "3:04:05"]


def test_package_warnings_go_to_the_latest_log(tmp_path, capsys):
    import logging

    warn = logging.getLogger("dad_fast.data").warning
    first = RunLog(tmp_path / "first")
    with RunLog(tmp_path / "second"):
        warn("%s cannot be read", "a.jpg")
    warn("nobody's any more")
    first.close()
    assert "warning: a.jpg cannot be read" in (tmp_path / "second/train.log").read_text()
    assert (tmp_path / "first/train.log").read_text() == "" and "nobody" not in (
        tmp_path / "second/train.log"
    ).read_text()
    assert capsys.readouterr().err.count("a.jpg") == 1


def test_long_log_is_rotated(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "LOG_BYTES", 1000)
    with RunLog(tmp_path, echo=lambda line: None) as log:
        for number in range(100):
            log.say(f"line {number}")
            log.metrics("train", step=number)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("train.log*")}
    assert set(sizes) == {"train.log", "train.log.1"} and max(sizes.values()) < 1100
    kept = (tmp_path / "train.log.1").read_text() + (tmp_path / "train.log").read_text()
    numbers = [int(line.split()[-1]) for line in kept.splitlines()]
    assert numbers == list(range(numbers[0], 100))
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(100))
