"""Weights & Biases: a run of the project WANDB_PROJECT, or "dad-fast"."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.loggers.sinks import RunInfo, Sink, scalars

# Seconds that W&B may take to begin and to end a run.
TIMEOUT = 40.0


class WeightsAndBiases(Sink):
    """Sends scalars, settings, pictures and tables to W&B, or with WANDB_MODE=offline to files.

    The run's id is that of its folder, so a resumed run continues the same W&B run. W&B itself
    samples the machine (CPU, memory, GPUs). The horizontal axis is `step`: W&B's own must grow, and
    a resumed run repeats steps.
    """

    package = ("wandb", "wandb>=0.31")

    def __init__(self, folder: Path) -> None:
        import wandb

        self._wandb = wandb
        self._folder = folder

    def start(self, run: RunInfo) -> None:
        wandb = self._wandb
        offline = os.environ.get("WANDB_MODE", "online") != "online"
        # console off: capturing the output would tear the progress bar.
        quiet = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=TIMEOUT,
            finish_timeout=TIMEOUT,
            finish_timeout_raises=True,
        )
        wandb.setup(settings=quiet)
        # Without a key wandb.init would ask for it on the terminal, below the progress bar.
        if not offline and not wandb.login(prompt=False, verify=False):
            raise PermissionError("not logged in; run wandb login, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dad-fast"),
            id=run.run_id,
            name=run.name,
            resume="allow",
            # Runs that train together are open side by side.
            reinit="create_new",
            config={key: _plain(value) for key, value in run.settings.items()},
            dir=str(self._folder),
            settings=quiet,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({**dict(scalars(kind, values)), "step": step})

    def picture(self, name: str, step: int, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "step": step})

    def table(
        self, name: str, step: int, header: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        table = self._wandb.Table(columns=list(header), data=[list(row) for row in rows])
        self._run.log({name: table, "step": step})

    def close(self) -> None:
        self._run.finish()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
