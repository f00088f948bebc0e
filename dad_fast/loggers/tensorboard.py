"""TensorBoard: event files in the run's folder, below `tensorboard/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.loggers.sinks import RunInfo, Sink, markdown, scalars


class TensorBoard(Sink):
    """Writes scalars, hyperparameters, pictures and tables as TensorBoard events.

    A resumed run continues in the same folder; TensorBoard then hides the events of steps that the
    run repeats (purge_step).
    """

    package = ("tensorboard", "tensorboard>=2.21")

    def __init__(self, folder: Path) -> None:
        import tensorboard  # noqa: F401 (torch's message for its absence is a long one)
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._folder = folder / "tensorboard"

    def start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard.summary import hparams

        # Metrics of the step itself were written before its checkpoint.
        purge = run.step + 1 if run.step else None
        self._writer = self._open(str(self._folder), purge_step=purge)
        settings = {key: _simple(value) for key, value in run.settings.items()}
        for summary in hparams(settings, {"val/top1": 0.0}):
            self._writer.file_writer.add_summary(summary)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in scalars(kind, values):
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def table(
        self, name: str, step: int, header: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        self._writer.add_text(name, markdown(header, rows), step)

    def close(self) -> None:
        self._writer.close()


def _simple(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
