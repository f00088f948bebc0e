"""Sinks of a user's module, named `python:tests.loggers.my_sinks:NAME` after `--log-to`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

from dad_fast.loggers.sinks import RunInfo, Sink


class Kept(Sink):
    """Keeps what it is given; the last one opened is `Kept.last`."""

    last: Kept

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[tuple[str, int, dict[str, Any]]] = []
        self.closed = 0
        Kept.last = self

    def start(self, run: RunInfo) -> None:
        self.run = run

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.rows.append((kind, step, dict(values)))

    def close(self) -> None:
        self.closed += 1


class Failing(Sink):
    """Raises at its second line."""

    def __init__(self, folder: Path) -> None:
        self.calls = 0

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("server is down")

    def close(self) -> None:
        raise AssertionError("a dropped sink is not called again")


class Exiting(Failing):
    """Ends as a library does that calls sys.exit."""

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        raise SystemExit("no licence")


def unopenable(folder: Path) -> Sink:
    raise ConnectionError("no route to host")


class Silent(Sink):
    """Waits in its first line, as for a server that never answers."""

    released = Event()

    def __init__(self, folder: Path) -> None:
        pass

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.released.wait()


class Uninstalled(Kept):
    """Needs a package that does not exist."""

    package = ("no_such_package", "no-such-package>=1")
