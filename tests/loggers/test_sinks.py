"""Sinks next to metrics.jsonl: by name, by a user's module, and when they fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.loggers.run_log import RunLog, read_metrics
from dad_fast.loggers.sinks import SINKS, open_sinks
from dad_fast.loggers.trackers import numbers
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
    with pytest.raises(UsageError, match="--log-to tensorbord: no such log sink; did you mean ten"):
        open_sinks(["tensorbord"], tmp_path)
    with pytest.raises(
        EnvironmentProblem, match=":unopenable: cannot be opened .*no route to host"
    ):
        open_sinks([f"{MODULE}:unopenable"], tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_package_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert name in SINKS
    with pytest.raises(EnvironmentProblem, match=f"pip install {name}"):
        open_sinks([name], tmp_path)


class Tracker(ModuleType):
    """Stands for the packages of all three trackers: records the calls that a sink makes."""

    def __init__(self) -> None:
        super().__init__("tracker")
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "logged", "closed"),
    [
        ("tensorboard", ("add_scalar", ("train/loss", 0.5, 3), {}), "close"),
        ("wandb", ("log", ({"train/loss": 0.5, "step": 3},), {}), "finish"),
        ("mlflow", ("log_metrics", ({"train/loss": 0.5},), {"step": 3}), "end_run"),
    ],
)
def test_trackers_are_called(
    name: str, logged: tuple, closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker()
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, tracker)
    with RunLog(tmp_path, sinks=open_sinks([name], tmp_path)) as log:
        log.metrics("train", step=3, loss=0.5, note="a text")
    assert tracker.calls[1:] == [logged, (closed, (), {})]


def test_numbers_of_a_line() -> None:
    values = {"step": 1, "loss": 2, "ok": True, "name": "x", "gpu": {"power_w": 300.0}}
    assert numbers("train", values) == {"train/loss": 2.0, "train/gpu/power_w": 300.0}
