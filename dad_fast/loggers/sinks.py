"""Log sinks: receivers of a run's metrics next to metrics.jsonl, named by `--log-to`.

None is built in yet. To add one: a file with a factory, and a line here. A factory is called with the run's folder and
returns a `Sink`. Factories of other packages (entry points of `dad_fast.sinks`) and of a user's
module (`python:MODULE:FACTORY`) work the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.errors import EnvironmentProblem
from dad_fast.registry import Registry


class Sink(ABC):
    """Base class of sinks. Only rank 0 has sinks.

    `log` and `close` may raise: the run then warns, drops the sink and continues.
    """

    name = ""  # as given after --log-to; set by `open_sinks`

    @abstractmethod
    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Receive one line of metrics. kind: such as "train" or "val"; step: 0 where it has none.

        values: as in metrics.jsonl: numbers, texts and lists or tables of them.
        """

    def close(self) -> None:  # noqa: B027 (most sinks hold nothing)
        """Flush and release; called once, at the end of the run."""


SinkFactory = Callable[[Path], Sink]
SINKS: Registry[SinkFactory] = Registry("log sink", "dad_fast.sinks", "--log-to")


def open_sinks(names: Sequence[str], folder: str | Path) -> list[Sink]:
    """Open the sinks `names` for the run in `folder`.

    Raises UsageError for an unknown name, EnvironmentProblem for a sink that cannot be opened.
    """
    sinks: list[Sink] = []
    for name in dict.fromkeys(names):
        factory = SINKS[name]
        try:
            sink = factory(Path(folder))
        except EnvironmentProblem:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise EnvironmentProblem(f"--log-to {name}: cannot be opened ({reason})") from error
        sink.name = name
        sinks.append(sink)
    return sinks
