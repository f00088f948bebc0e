"""Sinks next to metrics.jsonl: by name, by a user's module, and when they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from dad_fast.cli.main import main
from dad_fast.config import Config
from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.loggers import run_log
from dad_fast.loggers.run_log import RunLog, read_metrics
from dad_fast.loggers.sinks import OpenSink, check_sinks, markdown, open_sinks, scalars
from tests.loggers import my_sinks

MODULE = "python:tests.loggers.my_sinks"


def opened(folder: Path, *names: str, step: int = 0) -> list[OpenSink]:
    return open_sinks(Config(log_to=names), folder, step)


def test_sink_of_a_users_module_receives_every_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, sinks=opened(tmp_path, f"{MODULE}:Kept")) as log:
        log.metrics("train", step=3, loss=0.5)
        log.metrics("end", seconds=1.0)
    kept = my_sinks.Kept.last
    assert kept.folder == tmp_path and kept.closed == 1
    assert kept.rows == [("train", 3, {"step": 3, "loss": 0.5}), ("end", 0, {"seconds": 1.0})]
    assert [row["kind"] for row in read_metrics(tmp_path)] == ["train", "end"]


def test_a_resumed_run_has_the_same_id_and_an_overwritten_one_a_new_one(tmp_path: Path) -> None:
    from dad_fast.sweep.runs import clear

    def run_of(folder: Path, step: int = 0) -> tuple[str, str, int]:
        RunLog(folder, sinks=opened(folder, f"{MODULE}:Kept", step=step)).close()
        run = my_sinks.Kept.last.run
        assert run.settings["optim.lr"] == 1e-3
        return run.run_id, run.name, run.step

    first, *_ = run_of(tmp_path / "demo/kd/seed-1")
    assert run_of(tmp_path / "demo/kd/seed-1", step=20) == (first, "demo/kd/seed-1", 20)
    assert run_of(tmp_path / "demo")[1] == "demo"
    clear(tmp_path / "demo")
    assert run_of(tmp_path / "demo")[0] != first


def test_failing_sink_is_dropped_with_one_warning(tmp_path: Path) -> None:
    lines: list[str] = []
    sinks = opened(tmp_path, f"{MODULE}:Failing", f"{MODULE}:Kept")
    with RunLog(tmp_path, echo=lines.append, sinks=sinks) as log:
        for step in range(4):
            log.metrics("train", step=step)
    assert len(lines) == 1 and "warning: --log-to" in lines[0] and "server is down" in lines[0]
    assert [row[1] for row in my_sinks.Kept.last.rows] == [0, 1, 2, 3]
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_sink_that_calls_sys_exit_is_one_warning(tmp_path: Path) -> None:
    lines: list[str] = []
    sinks = opened(tmp_path, f"{MODULE}:Exiting")
    with RunLog(tmp_path, echo=lines.append, sinks=sinks) as log:
        log.metrics("train", step=0)
    assert len(lines) == 1 and "SystemExit: no licence" in lines[0]


def test_a_sink_that_cannot_be_opened_is_one_warning(tmp_path: Path) -> None:
    lines: list[str] = []
    sinks = opened(tmp_path, f"{MODULE}:unopenable")
    with RunLog(tmp_path, echo=lines.append, sinks=sinks) as log:
        log.metrics("train", step=0)
    assert len(lines) == 1 and ":unopenable: ConnectionError: no route to host" in lines[0]
    assert len(read_metrics(tmp_path)) == 1


def test_a_sink_that_never_answers_keeps_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "PATIENCE", 0.05)
    lines: list[str] = []
    sinks = opened(tmp_path, f"{MODULE}:Silent", f"{MODULE}:Kept")
    try:
        with RunLog(tmp_path, echo=lines.append, sinks=sinks) as log:
            for step in range(3):
                log.metrics("train", step=step)
    finally:
        my_sinks.Silent.released.set()
    assert len(lines) == 1 and ":Silent: no answer" in lines[0]
    assert len(read_metrics(tmp_path)) == 3


def test_only_rank_0_has_sinks(tmp_path: Path) -> None:
    with RunLog(tmp_path, rank=1, sinks=opened(tmp_path, f"{MODULE}:Kept")) as log:
        log.metrics("train", step=0)
    assert my_sinks.Kept.last.rows == []


def test_unknown_sinks_and_missing_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--log-to tensorbord: .* did you mean tensorboard"):
        check_sinks(["tensorbord"])
    missing = r"the package no_such_package is missing; pip install 'no-such-package>=1'"
    with pytest.raises(EnvironmentProblem, match=missing):
        check_sinks([f"{MODULE}:Kept", f"{MODULE}:Uninstalled"])


def test_a_missing_package_ends_the_command_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    asked = ["--preset", "demo", "--log-to", f"{MODULE}:Uninstalled", "-o", str(run)]
    assert main(["train", *asked]) == 3
    error = capsys.readouterr().err
    assert "pip install 'no-such-package>=1'" in error and len(error.splitlines()) == 1
    assert not run.exists()


def test_numbers_of_a_line() -> None:
    values = {"step": 3, "loss": "nan", "applied": True, "gpu": {"power_w": 500, "throttled": []}}
    found = dict(scalars("train", values))
    assert found.keys() == {"train/loss", "train/gpu/power_w"}
    assert found["train/loss"] != found["train/loss"] and found["train/gpu/power_w"] == 500.0


def test_markdown_keeps_columns_apart() -> None:
    assert markdown(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
