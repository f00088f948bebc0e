"""MLflow: a run of the experiment MLFLOW_EXPERIMENT_NAME, or "dad-fast", at MLFLOW_TRACKING_URI."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.loggers.sinks import RunInfo, Sink, markdown, scalars

# Tag with the id of the run's folder, by which a resumed run finds its MLflow run.
TAG = "dad_fast.run_id"
# Limits of MLflow's API: parameters in one call, and characters of a value.
PARAMETERS, CHARACTERS = 100, 500


class MLflow(Sink):
    """Sends scalars, settings, pictures and tables to an MLflow server or a local store."""

    package = ("mlflow", "mlflow-skinny>=3.17")

    def __init__(self, folder: Path) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        # Its lines on the creation of tables would tear the progress bar.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._mlflow, self._metric, self._param = mlflow, Metric, Param

    def start(self, run: RunInfo) -> None:
        self._client = client = self._mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dad-fast")
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else client.create_experiment(name)
        known = client.search_runs([experiment], f"tags.`{TAG}` = '{run.run_id}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        tags = {TAG: run.run_id}
        self._id = client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        # MLflow refuses changes of parameters, so a resumed run keeps those that it began with.
        params = [self._param(k, str(v)[:CHARACTERS]) for k, v in run.settings.items()]
        for start in range(0, len(params), PARAMETERS):
            client.log_batch(self._id, params=params[start : start + PARAMETERS])

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_allowed(name), value, now, step) for name, value in scalars(kind, values)
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, name: str, step: int, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def table(
        self, name: str, step: int, header: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        self._client.log_text(self._id, markdown(header, rows), f"{name}.md")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _allowed(name: str) -> str:
    """Return the name of a metric without what MLflow refuses, such as "//" in a folder's path."""
    return re.sub(r"/+", "/", re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII))
