"""Progress of a run: a live bar on a terminal, a plain line every few seconds elsewhere.

Nothing here touches the device. `tick` only counts; values come at log steps, when the engine has read them anyway, so the
speed shown is that of finished work and not of kernels that were merely queued.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from dad_fast.observe.runlog import RunLog

PLAIN_SECONDS = 10.0
SHARES = {"data_wait": "data wait", "kept": "kept", "codes_changed": "codes changed", "codes_changed_dat": "codes changed (dat)"}
USUAL = {"applied": 1.0, "bad_images": 0.0}  # shown only when they are anything else


class TrainProgress:
    """Shows one run. A context manager; the live bar is up between enter and exit.

    total_steps, start_step  the run's length, and where a resumed run starts
    images_per_step          clean images of a step, over all processes
    log                      gets the plain lines (train.log); it also shows them where there is no terminal
    label                    what is trained, such as "dad seed 0"
    live                     None = when stderr is a terminal and rich is installed
    """

    def __init__(
        self, total_steps: int, start_step: int, images_per_step: int, log: RunLog, *, label: str = "training", live: bool | None = None
    ) -> None:
        self.total_steps, self.images_per_step = total_steps, images_per_step
        self.label, self.log = label, log
        self._bar: Any = _make_bar() if live or (live is None and sys.stderr.isatty()) else None
        self._task: Any = None
        self._echo = log.echo
        self._start = start_step
        self._last_line = time.monotonic()

    def __enter__(self) -> TrainProgress:
        if self._bar is not None:
            self._task = self._bar.add_task(self.label, total=self.total_steps, completed=self._start, text="")
            self._bar.start()
            self.log.echo = lambda line: self._bar.console.print(line, markup=False, highlight=False)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self.log.echo = self._echo

    def tick(self, step: int) -> None:
        """`step` steps of the run were queued."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def values(self, row: Mapping[str, float]) -> None:
        """At a log step, after its values were read from the device: the row of metrics.jsonl with `step`, `epoch`, `img_per_s`
        (clean images), `data_wait` (share of the time) and the parts of the loss."""
        now = time.monotonic()
        text = self._text(row)
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        if now - self._last_line >= PLAIN_SECONDS or row["step"] >= self.total_steps:
            self._last_line = now
            where = f"{self.label}  epoch {row['epoch']:.1f}  step {row['step']}/{self.total_steps}"
            self.log.say(f"{where}  {text}", echo=self._bar is None)

    def evaluating(self, name: str) -> Callable[[int, int], None]:
        """A callback (images done, images in all) for `evaluate`, shown in this bar."""

        def show(done: int, total: int) -> None:
            if self._bar is not None:
                self._bar.update(self._task, text=f"evaluating {name} {done}/{total}")

        return show

    def _text(self, row: Mapping[str, float]) -> str:
        parts = [f"{row['img_per_s']:,.0f} img/s"]
        if row["img_per_s"] > 0:
            parts.append(format_seconds((self.total_steps - row["step"]) * self.images_per_step / row["img_per_s"]) + " left")
        skip = ("step", "epoch", "img_per_s")
        parts += [format_value(name, value) for name, value in row.items() if name not in skip and USUAL.get(name) != value]
        return "  ".join(parts)


def counter(label: str, *, live: bool | None = None) -> Callable[[int, int], None]:
    """A callback (done, total) that shows counting on a terminal and nothing elsewhere: for work without a run's log."""
    if not (sys.stderr.isatty() if live is None else live):
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        print(f"\r{label} {done}/{total}" + ("\n" if done >= total else ""), end="", file=sys.stderr, flush=True)

    return show


def format_value(name: str, value: float) -> str:
    """One value of the progress line: "ce 0.412", "data wait 3 %", "12.1 GiB"."""
    if name in SHARES:
        return f"{SHARES[name]} {100 * value:.0f} %"
    if name == "gpu_memory_gb":
        return f"{value:.1f} GiB"
    return f"{name} {value:.3g}"


def format_seconds(seconds: float) -> str:
    """0:07, 12:30, 3:04:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _make_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:  # a bare GPU machine: plain lines do
        return None
    name, text = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[text]"))
    return Progress(
        name, BarColumn(bar_width=24), MofNCompleteColumn(), text, console=Console(stderr=True), refresh_per_second=2, transient=True
    )
