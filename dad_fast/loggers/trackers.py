"""Sinks for TensorBoard, Weights & Biases and MLflow: the numbers of each metrics line, by step.

Each package is optional (`pip install tensorboard`, `wandb` or `mlflow`) and is configured by its
own environment variables, such as WANDB_PROJECT and MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dad_fast.errors import EnvironmentProblem
from dad_fast.loggers.sinks import Sink


def numbers(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric values as "kind/name", those of nested tables as "kind/name/key"."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(f"{kind}/{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            found[f"{kind}/{name}"] = float(value)
    return found


class TensorBoardSink(Sink):
    """Event files in the run's folder; `tensorboard --logdir RUNS` shows them."""

    def __init__(self, folder: Path) -> None:
        self._writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in numbers(kind, values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """A run of W&B with the name of the run's folder. A resumed run is a new one there."""

    def __init__(self, folder: Path) -> None:
        wandb = _module("wandb", "wandb")
        self._run = wandb.init(dir=str(folder), name=folder.name)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        found = numbers(kind, values)
        if found:
            # W&B drops lines whose step is below the last one, so the step is a value as well.
            self._run.log({**found, "step": step})

    def close(self) -> None:
        self._run.finish()


class MlflowSink(Sink):
    """A run of MLflow with the name of the run's folder. A resumed run is a new one there."""

    def __init__(self, folder: Path) -> None:
        self._mlflow = _module("mlflow", "mlflow")
        self._mlflow.start_run(run_name=folder.name)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        found = numbers(kind, values)
        if found:
            self._mlflow.log_metrics(found, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"--log-to needs the package {package} ({error}); pip install {package}"
        ) from None
