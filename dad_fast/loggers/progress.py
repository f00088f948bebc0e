"""Progress of a run: a live bar on a terminal, a plain line every few seconds elsewhere.

Never touches the device. `tick` counts queued steps, so on a GPU the bar may be a few steps ahead.
Values arrive when the engine has read them from the device, so the speed is that of finished work,
not of queued kernels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from dad_fast.errors import printable
from dad_fast.loggers.run_log import RunLog, print_line

# Seconds between two plain lines.
PLAIN_SECONDS = 10.0
# Seconds without a line after which one comes between two log steps.
LONGEST_SILENCE = 30.0
# Steps, counted from the start or the resume, whose lines come whatever the time: the first one,
# and the one with the first estimate of the time left.
EARLY_LINES = (1, 10)
# Seconds between two reports of a worker process to its parent.
REPORT_SECONDS = 1.0
SHARES = {
    "data_wait": "data wait",
    "kept": "kept",
    "codes_changed": "codes changed",
    "codes_used": "codes used",
    "codes_changed_dat": "codes changed (dat)",
}


class TrainProgress:
    """Progress of one run. A context manager; the live bar is shown between enter and exit.

    Args:
        total_steps: length of the run.
        images_per_step: clean images of a step, over all processes.
        steps_per_epoch: for "epoch 3/20".
        label: of the run, such as "dad seed 0".
        log: receives the plain lines (train.log), and echoes them without a live bar.
        start_step: first step of a resumed run.
        live: None = if stderr is a terminal and rich is installed.
        bar: a live bar that runs which train together share; None = one of its own.
    """

    def __init__(
        self,
        total_steps: int,
        images_per_step: int,
        steps_per_epoch: int,
        label: str,
        log: RunLog,
        *,
        start_step: int = 0,
        live: bool | None = None,
        bar: Any = None,
    ) -> None:
        self.total_steps = total_steps
        self.images_per_step = images_per_step
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.label = label
        self.log = log
        self.step = start_step
        self.images_per_second = 0.0
        # Texts of the last values and of the last validation.
        self._values: list[str] = []
        self._validation: list[str] = []
        # Shown while the speed is unknown, such as the time of the first step.
        self.note = "… img/s"
        self._start_step = start_step
        # Step of the last line on the console.
        self._shown_step = -1
        self._bar = make_bar(live) if bar is None else bar
        self._task: Any = None
        self._echo = log.echo
        self._last_line = time.monotonic()
        # Time and step of the last values, from which the speed is measured.
        self._mark = (self._last_line, start_step)
        # Time and step of the first values, from which the time left is estimated: the first step
        # may have compiled for minutes.
        self._first_mark: tuple[float, int] | None = None

    def __enter__(self) -> TrainProgress:
        self._last_line = time.monotonic()
        self._mark = (self._last_line, self.step)
        if self._bar is not None:
            self._task = self._bar.add_task(
                self.label, total=self.total_steps, completed=self.step, text=""
            )
            self._bar.start()
            self.log.echo = lambda line: self._bar.console.print(
                line, markup=False, highlight=False
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self.log.echo = self._echo

    def tick(self) -> None:
        """Count a queued step."""
        self.step += 1
        if self._first_mark is not None and not self.images_per_second:
            # Until the second values: close enough, since few steps can be queued.
            self.images_per_second = self._speed_since(*self._first_mark)
        self._show_training()

    def is_due(self) -> bool:
        """Return whether values should be shown now, even between two log steps."""
        early = self.step - self._start_step in EARLY_LINES
        return early or time.monotonic() - self._last_line >= LONGEST_SILENCE

    def update(self, values: Mapping[str, float]) -> None:
        """Show values that have been read from the device.

        values: name → number, shown in this order; SHARES in percent, "gpu_memory" in GiB.
        """
        if self._first_mark is None:
            self._first_mark = (time.monotonic(), self.step)
        elif self.step > self._mark[1]:
            self.images_per_second = self._speed_since(*self._mark)
        self._mark = (time.monotonic(), self.step)
        self._values = [format_value(name, value) for name, value in values.items()]
        self._show_training()
        silence = time.monotonic() - self._last_line
        if self.is_due() or silence >= PLAIN_SECONDS or self.step >= self.total_steps:
            self._line("  ".join([self._speed(), *self._values]), echo=self._bar is None)

    def end_epoch(self) -> None:
        """Add a line for an epoch without a validation, unless its last step has one."""
        if self._shown_step != self.step:
            self._line("  ".join([self._speed(), *self._values]))

    def show_validation(self, top1: float, best: float) -> None:
        """Show the top-1 accuracy of a validation, and the best of the run so far, in percent."""
        self._validation = [f"val {top1:.1f} %"]
        text = f"validation: top-1 {top1:.2f} %, best so far {best:.2f} %"
        # The first value is the loss.
        self._line("  ".join([text, *self._values[:1]]))

    def pause(self) -> None:
        """Exclude the time so far from the speed: after a validation or a checkpoint."""
        self._mark = (time.monotonic(), self.step)
        self._show_training()

    def evaluating(self, name: str) -> Callable[[int, int], None]:
        """Return a callback (images done, all images) for `evaluate`, shown in this bar."""
        started = self._last_line = time.monotonic()

        def show(done: int, total: int) -> None:
            text = _count(f"evaluating {name}", done, total, started)
            report_progress(self.step, self.total_steps, text)
            if self._bar is not None:
                self._bar.update(self._task, text=text)
            elif done < total and time.monotonic() - self._last_line >= PLAIN_SECONDS:
                self._line(text)

        return show

    def _show_training(self) -> None:
        text = "  ".join([self._speed(), *self._validation, *self._values])
        report_progress(self.step, self.total_steps, text)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step, text=text)

    def _line(self, text: str, echo: bool = True) -> None:
        epochs = -(-self.total_steps // self.steps_per_epoch)
        epoch = min((self.step - 1) // self.steps_per_epoch + 1, epochs)
        position = f"epoch {epoch}/{epochs}  step {self.step}/{self.total_steps}"
        self._last_line = time.monotonic()
        if echo:
            self._shown_step = self.step
        self.log.say(f"{self.label}  {position}  {text}", echo=echo)

    def _speed_since(self, then: float, step: int) -> float:
        return (self.step - step) * self.images_per_step / max(time.monotonic() - then, 1e-9)

    def _speed(self) -> str:
        """Return images per second since the last values, and the time left.

        The time left is estimated from all steps since the first, with validations and checkpoints.
        """
        if not self.images_per_second or self._first_mark is None:
            return self.note
        average = self._speed_since(*self._first_mark)
        seconds = (self.total_steps - self.step) * self.images_per_step / average
        return f"{self.images_per_second:,.0f} img/s  {format_seconds(seconds)} left"


class JobsProgress:
    """Progress of the jobs of a sweep: a live bar for each on a terminal, else plain lines.

    A context manager.
    """

    def __init__(self, live: bool | None = None) -> None:
        """live: None = if stderr is a terminal and rich is installed."""
        self._bar = make_bar(live)
        self._tasks: dict[str, Any] = {}
        # Time of the last line of each job.
        self._lines: dict[str, float] = {}

    def __enter__(self) -> JobsProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line, above the bars if there are any."""
        if self._bar is None:
            print_line(line)
        else:
            self._bar.console.print(printable(line), markup=False, highlight=False)

    def update(self, job: str, done: int, total: int, text: str) -> None:
        """Show how far a job is."""
        if self._bar is not None:
            if job not in self._tasks:
                self._tasks[job] = self._bar.add_task(job, total=total, text="")
            self._bar.update(self._tasks[job], completed=done, total=total, text=printable(text))
            return
        now = time.monotonic()
        if now - self._lines.setdefault(job, now - PLAIN_SECONDS / 2) >= PLAIN_SECONDS:
            self._lines[job] = now
            self.say(f"{job}  {done}/{total}  {text}")

    def end(self, job: str) -> None:
        """Remove the bar of a job."""
        self._lines.pop(job, None)
        if job in self._tasks:
            self._bar.remove_task(self._tasks.pop(job))


_listener: Callable[[int, int, str], None] | None = None
_listener_heard = 0.0


def report_progress_to(listener: Callable[[int, int, str], None]) -> None:
    """Call `listener(done, total, text)` about once a second, to inform the parent process."""
    global _listener
    _listener = listener


def report_progress(done: int, total: int, text: str) -> None:
    """Report progress to the parent of a worker process; does nothing elsewhere."""
    global _listener_heard
    if _listener is None:
        return
    now = time.monotonic()
    if now - _listener_heard >= REPORT_SECONDS:
        _listener_heard = now
        _listener(done, total, text)


def format_value(name: str, value: float) -> str:
    """Format a value of the progress line: "ce 0.412", "data wait 3 %", "12.1 GiB"."""
    if name in SHARES:
        return f"{SHARES[name]} {100 * value:.0f} %"
    if name == "gpu_memory":
        return f"{value:.1f} GiB"
    return f"{name} {value:.3g}"


def format_seconds(seconds: float) -> str:
    """Format a duration: 0:07, 12:30, 3:04:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def make_bar(live: bool | None = None) -> Any:
    """Return a live bar, or None without rich.

    live: None = if stderr is a terminal.
    """
    if not (sys.stderr.isatty() if live is None else live):
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column
    except ImportError:
        # A bare checkout on a GPU machine prints plain lines.
        return None
    name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    bar = BarColumn(bar_width=12, table_column=Column(min_width=12))
    count = MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9))
    # On a narrow terminal the text is cut, not the bar.
    text = TextColumn(
        "{task.fields[text]}",
        markup=False,
        table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
    )
    console = Console(stderr=True)
    return Progress(
        name, bar, count, text, console=console, refresh_per_second=2, transient=True, expand=True
    )


def count_progress(
    text: str, *, enabled: bool = True, say: Callable[[str], None] = print_line
) -> Callable[[int, int], None]:
    """Return a callback (done, total) that shows "`text`: done of total, time left".

    On a terminal it rewrites one line and clears it at the end. Elsewhere `say` gets a line every
    PLAIN_SECONDS. Also reports to the parent of a worker process.
    """
    on_terminal = sys.stderr.isatty()
    started = last_line = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last_line
        report_progress(done, total, text)
        if not enabled:
            return
        line = _count(text, done, total, started)
        if on_terminal:
            rewritten = f"\r\x1b[K{line}" if done < total else "\r\x1b[K"
            print(rewritten, end="", file=sys.stderr, flush=True)
        elif done < total and time.monotonic() - last_line >= PLAIN_SECONDS:
            last_line = time.monotonic()
            say(line)

    return show


def _count(text: str, done: int, total: int, started: float) -> str:
    """Return "`text`: done of total, time left", estimated from the time since `started`."""
    line = f"{text}: {done:,} of {total:,}"
    if not done or done >= total:
        return line
    seconds = (time.monotonic() - started) / done * (total - done)
    return f"{line}, {format_seconds(seconds)} left"
