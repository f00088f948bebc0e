"""Sinks next to metrics.jsonl: by name, by a user's module, and when they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.loggers.run_log import RunLog, read_metrics
from dad_fast.loggers.sinks import open_sinks
from tests.loggers import my_sinks

MODULE = "python:tests.loggers.my_sinks"


def test_sink_of_a_users_module_receives_every_line(tmp_path: Path) -> None:
    sinks = open_sinks([f"{MODULE}:Kept"], tmp_path)
    with RunLog(tmp_path, sinks=sinks) as log:
        log.metrics("train", step=3, loss=0.5)
        log.metrics("end", seconds=1.0)
    kept = my_sinks.Kept.last
    assert kept.folder == tmp_path and kept.closed == 1
    assert kept.rows == [("train", 3, {"step": 3, "loss": 0.5}), ("end", 0, {"seconds": 1.0})]
    assert [row["kind"] for row in read_metrics(tmp_path)] == ["train", "end"]


def test_failing_sink_is_dropped_with_one_warning(tmp_path: Path) -> None:
    lines: list[str] = []
    sinks = open_sinks([f"{MODULE}:Failing", f"{MODULE}:Kept"], tmp_path)
    with RunLog(tmp_path, echo=lines.append, sinks=sinks) as log:
        for step in range(4):
            log.metrics("train", step=step)
    assert len(lines) == 1 and "warning: --log-to" in lines[0] and "server is down" in lines[0]
    assert [row[1] for row in my_sinks.Kept.last.rows] == [0, 1, 2, 3]
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_only_rank_0_has_sinks(tmp_path: Path) -> None:
    sinks = open_sinks([f"{MODULE}:Kept"], tmp_path)
    with RunLog(tmp_path, rank=1, sinks=sinks) as log:
        log.metrics("train", step=0)
    assert my_sinks.Kept.last.rows == []


def test_unknown_and_unopenable_sinks_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--log-to tensorbord: no such log sink"):
        open_sinks(["tensorbord"], tmp_path)
    with pytest.raises(
        EnvironmentProblem, match=":unopenable: cannot be opened .*no route to host"
    ):
        open_sinks([f"{MODULE}:unopenable"], tmp_path)
