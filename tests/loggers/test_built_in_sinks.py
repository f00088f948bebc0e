"""TensorBoard, W&B and MLflow for real, offline: what they are given is read back from their files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from PIL import Image

from dad_fast.config import Config
from dad_fast.loggers.run_log import RunLog, read_metrics
from dad_fast.loggers.sinks import RUN_ID, open_sinks
from tests.processes import wait_until
from tests.tiny import train_arguments

HEADER, ROWS = ["model", "val"], [["teacher", "98.7"], ["kd", "96.1"]]


def write_run(folder: Path, *names: str) -> list[str]:
    """Log four steps, resume after the second, and end; returns the lines shown to the user."""
    shown: list[str] = []
    cfg = Config(log_to=names)
    with RunLog(folder, echo=shown.append, sinks=open_sinks(cfg, folder)) as log:
        for step in (1, 2, 3, 4):
            log.metrics("train", step=step, loss=10.0 + step, gpu={"power_w": 500})
    Image.new("RGB", (4, 3), "red").save(folder / "sheet.png")
    with RunLog(folder, echo=shown.append, sinks=open_sinks(cfg, folder, step=2)) as log:
        for step in (3, 4):
            log.metrics("train", step=step, loss=20.0 + step)
        log.metrics("val", step=4, top1=50.0)
        log.metrics("test//data/x", step=4, top1=40.0)
        log.table("results", 4, HEADER, ROWS)
        log.picture("sheet", 4, folder / "sheet.png")
    return shown


def test_tensorboard_events_are_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert write_run(tmp_path, "tensorboard") == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    # The resumed run repeats the steps after its checkpoint; those of before are hidden.
    assert loss == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    assert events.Scalars("train/gpu/power_w")[0].value == 500.0
    assert events.Scalars("val/top1")[0].step == 4
    (image,) = events.Images("sheet")
    assert (image.width, image.height, image.step) == (4, 3, 4)
    (text,) = events.Tensors("results/text_summary")
    assert "| kd | 96.1 |" in text.tensor_proto.string_val[0].decode()
    plugins = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert plugins.plugin_name == "hparams" and b"optim.weight_decay" in plugins.content


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format after a header of seven bytes.

    A block of 32 KiB holds chunks with a header of checksum (4 bytes), length (2) and type (1: whole,
    2: first, 3: middle, 4: last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def is_ended(file: Path) -> bool:
    return any(record.WhichOneof("record_type") == "exit" for record in wandb_records(file))


def test_wandb_writes_one_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert write_run(tmp_path, "wandb") == []
    run_id = (tmp_path / RUN_ID).read_text().strip()
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2
    # W&B's own process ends the files shortly after `finish`.
    wait_until(lambda: all(is_ended(file) for file in files))
    rows, settings = [], {}
    for file in files:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): i.value_json for i in items})
            for item in record.run.config.update:
                settings[item.key] = json.loads(item.value_json)
    assert settings["optim.weight_decay"] == 0.05 and settings["method"] == "dad"
    losses = [float(row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [11.0, 12.0, 13.0, 14.0, 23.0, 24.0]
    # A picture is several keys: sheet/path, sheet/width and others.
    shown = {name for row in rows for name in row} | {n.split("/")[0] for row in rows for n in row}
    assert {"step", "val/top1", "train/gpu/power_w", "sheet", "results"} <= shown


def test_wandb_without_a_login_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (line, again) = write_run(tmp_path / "run", "wandb")
    assert "--log-to wandb: PermissionError: not logged in" in line and again == line
    assert len(read_metrics(tmp_path / "run", "train")) == 6


def test_mlflow_store_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    # MLflow asks for this since it prefers SQLite, whose tables take seconds to create.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert write_run(tmp_path / "run", "mlflow") == []
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("dad-fast")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["optim.weight_decay"] == "0.05"
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(losses) == [(1, 11), (2, 12), (3, 13), (3, 23), (4, 14), (4, 24)]
    assert run.data.metrics["test/data/x/top1"] == 40.0
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"results.md", "sheet.png"}


def test_a_server_that_is_down_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with RunLog(
        tmp_path, echo=(shown := []).append, sinks=open_sinks(Config(log_to=("mlflow",)), tmp_path)
    ) as log:
        log.metrics("train", step=1, loss=1.0)
    assert len(shown) == 1 and shown[0].startswith("warning: --log-to mlflow: MlflowException")


def test_a_run_sends_its_metrics_sheet_and_table(parts: Path, tmp_path: Path) -> None:
    """One run of the command: the scalars of metrics.jsonl, the sheet and the table arrive."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dad_fast.cli.main import main

    run = tmp_path / "run"
    assert main(train_arguments(parts, run, "--log-to", "tensorboard", "--device", "cpu")) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for row in read_metrics(run):
        if row["kind"] in ("train", "val", "test/val"):
            name = next(name for name in ("loss", "ce", "top1") if name in row)
            (event,) = events.Scalars(f"{row['kind']}/{name}")
            assert event.step == row["step"]
            assert event.value == pytest.approx(row[name], rel=1e-6)
    assert {row["kind"] for row in read_metrics(run)} >= {"train", "val", "test/val"}
    assert events.Images("sheet") and events.Tensors("results/text_summary")
