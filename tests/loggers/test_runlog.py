"""Logs, atomic files, progress."""

from __future__ import annotations

import io
import itertools
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


def progress_lines(tmp_path, monkeypatch, seconds_per_step, use):
    """Lines of a run on a clock that only its steps advance; `use` gets the progress and the step."""
    lines: list[str] = []
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with RunLog(tmp_path, echo=lines.append) as log:
        with TrainProgress(100, 10, 20, "kd", log, live=False) as bar:
            for step in range(1, 101):
                now[0] += seconds_per_step
                bar.tick()
                use(bar, step, now)
    return lines


def test_first_step_then_a_line_in_every_silence(tmp_path, monkeypatch):
    def without_log_steps(bar, step, now):
        bar.note = "first step 4.0 s"
        if bar.is_due():
            bar.update({"loss": 1.0})

    lines = progress_lines(tmp_path, monkeypatch, 4.0, without_log_steps)
    steps = [int(line.partition("step ")[2].partition("/")[0]) for line in lines]
    assert steps[:3] == [1, 9, 10] and max(b - a for a, b in itertools.pairwise(steps)) * 4 <= 32
    assert lines[0] == "kd  epoch 1/5  step 1/100  first step 4.0 s  loss 1"
    assert lines[2] == "kd  epoch 1/5  step 10/100  2 img/s  6:00 left  loss 1"


def test_time_left_is_averaged_over_the_run_with_its_validations(tmp_path, monkeypatch):
    def with_validations(bar, step, now):
        if bar.is_due() or step % 10 == 0:
            bar.update({"loss": 1.0})
        if step % 20 == 0:
            now[0] += 20.0  # as long as the steps of an epoch
            bar.show_validation(50.0 + step / 10, 60.0)
            bar.pause()

    lines = progress_lines(tmp_path, monkeypatch, 1.0, with_validations)
    assert [line for line in lines if "validation" in line][1] == (
        "kd  epoch 2/5  step 40/100  validation: top-1 54.00 %, best so far 60.00 %  loss 1"
    )
    # 69 s of steps and 60 s of validations for 69 steps.
    assert "kd  epoch 4/5  step 70/100  10 img/s  0:56 left  loss 1" in lines


def test_long_evaluation_shows_lines_with_its_time_left(tmp_path, monkeypatch):
    lines: list[str] = []
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    with RunLog(tmp_path, echo=lines.append) as log:
        with TrainProgress(100, 10, 20, "kd", log, live=False) as bar:
            bar.tick()
            for begin in (
                lambda: bar.evaluating("val"),
                lambda: progress.count_progress("evaluating test", say=lines.append),
            ):
                show = begin()
                for done in range(5, 31, 5):
                    now[0] += 5.0
                    show(done, 30)
    assert lines == [
        "kd  epoch 1/5  step 1/100  evaluating val: 10 of 30, 0:20 left",
        "kd  epoch 1/5  step 1/100  evaluating val: 20 of 30, 0:10 left",
        "evaluating test: 10 of 30, 0:20 left",
        "evaluating test: 20 of 30, 0:10 left",
    ]


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
            bar._bar.refresh()
            bar.show_validation(61.25, 70.0)
            before_pause = shown.getvalue()
            bar.pause()
            bar._bar.refresh()
        after = shown.getvalue().removeprefix(before_pause)
        assert "validation: top-1 61.25 %, best so far 70.00 %" in before_pause
        assert "val 61.2 %  loss 0.5" in after and "evaluating" not in after
        assert log.echo is before
    text = shown.getvalue()
    assert (
        "kd [seed] 0" in text
        and "4/4" in text
        and "[note] checkpoint saved" in text
        and "evaluating optdigits: 3 of 9" in text
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
