"""Log files of a run: `metrics.jsonl` for programs and `train.log` for people."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from dad_fast.errors import printable
from dad_fast.files import disk_error, no_link, plain
from dad_fast.loggers.sinks import PATIENCE, OpenSink
from dad_fast.loggers.warning_lines import WarningLines

# Size of train.log, about two weeks of a line every ten seconds; beyond, it replaces train.log.1.
LOG_BYTES = 16 * 2**20


def print_line(text: str) -> None:
    """Print a line to stderr and flush it; stdout is for results."""
    print(printable(text), file=sys.stderr, flush=True)


class RunLog:
    """Logs of the run in `folder`, opened for appending.

    Drops an incomplete last line, left by a killed process, on opening. Also receives the warnings
    of this package until another RunLog is opened.

    Args:
        echo: shows a line to the user. `TrainProgress` replaces it while its live bar is shown, so
            that lines appear above the bar.
        rank: of several processes only rank 0 writes metrics and shows lines; the others write to
            `train-rankN.log`.
        sinks: further receivers of metrics (see `loggers.sinks`). One that fails is dropped with one
            warning. `close` closes them.
    """

    def __init__(
        self,
        folder: str | Path,
        echo: Callable[[str], None] = print_line,
        rank: int = 0,
        sinks: Sequence[OpenSink] = (),
    ) -> None:
        self.folder = Path(folder)
        self.echo = echo if rank == 0 else lambda text: None
        self._sinks = list(sinks) if rank == 0 else []
        metrics = "metrics.jsonl" if rank == 0 else os.devnull
        text = f"train-rank{rank}.log" if rank else "train.log"
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._metrics = open(self.folder / metrics, "a+b", buffering=0, opener=no_link)
            self._text = open(self.folder / text, "ab", buffering=0, opener=no_link)
        self.truncate_to(self._metrics.seek(0, os.SEEK_END))
        self._warnings = _Warnings(self)
        self._warnings.install()
        self._working()

    def metrics(self, kind: str, **values: Any) -> None:
        """Append `{"kind": kind, "time": seconds since 1970, **values}` to metrics.jsonl.

        The sinks receive kind, step and values.
        """
        values = plain(values)
        row = {"kind": kind, "time": round(time.time(), 3), **values}
        _append(self._metrics, json.dumps(row, allow_nan=False) + "\n")
        for sink in self._working():
            sink.log(kind, int(values.get("step", 0)), values)

    def picture(self, name: str, step: int, path: Path) -> None:
        """Give the sinks a PNG file."""
        for sink in self._working():
            sink.picture(name, step, path)

    def table(
        self, name: str, step: int, header: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Give the sinks a table of texts."""
        for sink in self._working():
            sink.table(name, step, header, rows)

    def say(self, text: str, *, echo: bool = True) -> None:
        """Append a line to train.log and show it if `echo`. Escapes control characters."""
        text = printable(text)
        _append(self._text, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self._text.tell() > LOG_BYTES:
            with _disk(self._text.name):
                self._text.close()
                os.replace(self._text.name, f"{self._text.name}.1")
                self._text = open(self._text.name, "ab", buffering=0, opener=no_link)
        if echo:
            self.echo(text)

    def offset(self) -> int:
        """Return the length of metrics.jsonl in bytes, for `truncate_to`."""
        with _disk(self._metrics.name):
            return self._metrics.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk."""
        with _disk(self._metrics.name):
            os.fsync(self._metrics.fileno())

    def truncate_to(self, offset: int) -> None:
        """Drop the lines after `offset` bytes and an incomplete line before it.

        A resumed run repeats the steps of the dropped lines.
        """
        with _disk(self._metrics.name):
            content = Path(self._metrics.name).read_bytes()
            kept = content.rfind(b"\n", 0, offset) + 1
            if kept != len(content):
                self._metrics.truncate(kept)

    def also_receive_warnings(self) -> None:
        """Receive warnings besides the RunLog that was opened after this one."""
        self._warnings.add()

    def close(self) -> None:
        self._warnings.remove_all()
        self.close_sinks()
        self._metrics.close()
        self._text.close()

    def close_sinks(self) -> None:
        """Close the sinks: a run calls this at its end, also when it failed or was stopped."""
        deadline = time.monotonic() + PATIENCE
        for sink in self._sinks:
            sink.finish()
        for sink in self._sinks:
            sink.wait_until(deadline)
        self._working()
        self._sinks = []

    def _working(self) -> list[OpenSink]:
        """Return the sinks that work; warn of the others once and drop them."""
        for sink in self._sinks:
            if sink.problem:
                kept = "metrics go to metrics.jsonl alone"
                self.say(f"warning: --log-to {sink.name}: {sink.problem}; {kept}")
        self._sinks = [sink for sink in self._sinks if not sink.problem]
        return self._sinks

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def _disk(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, "continue with --resume auto") from error


def _append(file: FileIO, text: str) -> None:
    """Write all of `text` at once.

    With a buffer, the rest of a failed write would be tried again, and fail again, at exit.
    """
    with _disk(file.name):
        rest = memoryview(text.encode())
        while rest:
            rest = rest[file.write(rest) :]


class _Warnings(WarningLines):
    """Handler that sends warnings to the RunLog, and shows those that were not shown before.

    Replaces the handler of the last run, and that of the command, which would tear the live bar.
    """

    def __init__(self, log: RunLog) -> None:
        super().__init__()
        self._log = log

    def write(self, text: str, is_new: bool) -> None:
        self._log.say(text, echo=is_new)


def read_metrics(folder: str | Path, kind: str = "") -> list[dict[str, Any]]:
    """Return the lines of `folder`/metrics.jsonl, of one kind if named.

    A missing file gives an empty list; an incomplete last line is left out.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if not kind or row["kind"] == kind]
