"""Log sinks: receivers of a run's metrics next to metrics.jsonl, named by `--log-to`.

To add one: a file with a subclass of `Sink`, and a line here. Sinks of other packages (entry points
of `dad_fast.sinks`) and of a user's module (`python:MODULE:FACTORY`) work the same way.

Each open sink works in a thread of its own, so that a slow or silent server does not slow training.
"""

from __future__ import annotations

import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from dad_fast.config.fields import get, settings
from dad_fast.config.schema import Config
from dad_fast.errors import EnvironmentProblem
from dad_fast.files import atomic_write_text
from dad_fast.registry import Registry

# Name of the file with the run's id, in the run's folder.
RUN_ID = "run-id"
# Seconds that the end of a run waits for its sinks.
PATIENCE = 60.0


@dataclass(frozen=True)
class RunInfo:
    """Description of a run, for sinks.

    run_id: 16 hexadecimal digits, drawn once and kept in the run's folder: a resumed run has the
    same. settings: every setting of the run by its key, such as "optim.lr". step: the step at which
    this process begins, 0 for a new run.
    """

    name: str
    run_id: str
    settings: Mapping[str, Any]
    step: int = 0


class Sink(ABC):
    """Base class of sinks. Only rank 0 has sinks.

    A factory is called with the run's folder, in the main thread: a sink imports its packages in
    `__init__`. All other methods are called in one thread, in the order of the run. All may raise:
    the run then warns once, drops the sink and continues.

    package: what the sink needs, as (module, requirement for pip install); checked before a run
    writes anything.
    """

    package: tuple[str, str] | None = None

    def start(self, run: RunInfo) -> None:  # noqa: B027 (may do nothing)
        """Receive the description of the run, before everything else. May wait for a server."""

    @abstractmethod
    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Receive one line of metrics. kind: such as "train" or "val"; step: 0 where it has none.

        values: as in metrics.jsonl: numbers, texts, and lists or tables of them.
        """

    def picture(self, name: str, step: int, path: Path) -> None:  # noqa: B027 (may do nothing)
        """Receive a PNG file, such as the sheet of attacked images."""

    def table(  # noqa: B027 (may do nothing)
        self, name: str, step: int, header: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Receive a table of texts, such as the results at the end."""

    def close(self) -> None:  # noqa: B027 (most sinks hold nothing)
        """Flush and release; called once, at the end of the run."""


SinkFactory = Callable[[Path], Sink]
SINKS: Registry[SinkFactory] = Registry("log sink", "dad_fast.sinks", "--log-to")
SINKS.add("tensorboard", "dad_fast.loggers.tensorboard:TensorBoard")
SINKS.add("wandb", "dad_fast.loggers.wandb:WeightsAndBiases")
SINKS.add("mlflow", "dad_fast.loggers.mlflow:MLflow")


def check_sinks(names: Sequence[str]) -> None:
    """Raise UsageError for an unknown sink, EnvironmentProblem for one whose package is missing."""
    for name in names:
        package = getattr(SINKS[name], "package", None)
        if package is not None and find_spec(package[0]) is None:
            raise EnvironmentProblem(
                f"--log-to {name}: the package {package[0]} is missing; "
                f"pip install '{package[1]}', or leave {name} out"
            )


class OpenSink:
    """A sink and the thread in which it works. `problem` is why it is off, "" while it works."""

    def __init__(self, name: str, folder: Path, run: RunInfo) -> None:
        """Open the sink called `name`. Raises UsageError for an unknown name, and nothing else."""
        self.name = name
        self.problem = ""
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # daemon: a sink that never answers must not keep the process.
        self._thread = Thread(target=self._work, name=f"sink {name}", daemon=True)
        factory = SINKS[name]
        try:
            self._sink = factory(folder)
        except Exception as error:
            self.problem = _describe(error)
            return
        self._calls.put(partial(self._sink.start, run))
        self._thread.start()

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Pass on `Sink.log`, without waiting."""
        self._calls.put(partial(self._sink.log, kind, step, values))

    def picture(self, name: str, step: int, path: Path) -> None:
        """Pass on `Sink.picture`, without waiting."""
        self._calls.put(partial(self._sink.picture, name, step, path))

    def table(
        self, name: str, step: int, header: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Pass on `Sink.table`, without waiting."""
        self._calls.put(partial(self._sink.table, name, step, header, rows))

    def finish(self) -> None:
        """Have the sink closed after what it was sent, without waiting."""
        self._calls.put(self._sink.close)
        self._calls.put(None)

    def wait_until(self, deadline: float) -> None:
        """Wait for the end of `finish`; give the sink up at `deadline`, on time.monotonic's clock."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and not self.problem:
            self.problem = f"no answer in {PATIENCE:g} s at the end of the run"

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as error:
                # A library that calls sys.exit would end this thread without a word.
                self.problem = _describe(error)
                return


def open_sinks(cfg: Config, folder: str | Path, step: int = 0) -> list[OpenSink]:
    """Open the sinks of `cfg.log_to` for the run in `folder`, which begins at `step`.

    Those that cannot be opened have a `problem`. Raises UsageError for an unknown name.
    """
    if not cfg.log_to:
        return []
    folder = Path(folder)
    values = {path: get(cfg, path) for path in settings()}
    run = RunInfo(_run_name(folder), _run_id(folder), values, step)
    return [OpenSink(name, folder, run) for name in dict.fromkeys(cfg.log_to)]


def _run_id(folder: Path) -> str:
    """Return the id of the run in `folder`; draws and keeps one for a new run."""
    path = folder / RUN_ID
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if re.fullmatch(r"[0-9a-f]{16}", known):
        return known
    drawn = secrets.token_hex(8)
    atomic_write_text(path, drawn + "\n")
    return drawn


def _run_name(folder: Path) -> str:
    """Return the name of the run in `folder`: DEMO, or DEMO/VARIANT/seed-S within a comparison."""
    parts = folder.resolve().parts
    return "/".join(parts[-3:] if parts[-1].startswith("seed-") else parts[-1:])


def _describe(error: BaseException) -> str:
    """Return an exception as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def scalars(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers among `values` except the step, as ("train/loss", 0.5).

    A number of a table is ("train/gpu/power_w", 512.5). Numbers that JSON lacks come as texts
    ("nan") and are yielded as floats.
    """
    for name, value in values.items():
        if name == "step":
            continue
        if isinstance(value, Mapping):
            yield from scalars(f"{kind}/{name}", value)
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number or value in ("nan", "inf", "-inf"):
            yield f"{kind}/{name}", float(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown."""
    cells = [[text.replace("|", "\\|") for text in line] for line in (header, *rows)]
    cells.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
