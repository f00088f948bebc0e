"""A run's log files: `metrics.jsonl` for programs, `train.log` for people, and what `run.json` says of the machine."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from dad_fast.cores import num_cores, side_by_side
from dad_fast.errors import printable
from dad_fast.files import disk_error, no_link, plain

PACKAGES = (
    "dad-fast",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "open_clip_torch",
    "apache-tvm-ffi",
    "safetensors",
    "numpy",
    "pillow",
    "nvidia-ml-py",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "xformers",
    "apex",
)


LOG_BYTES = (
    16 * 2**20
)  # of train.log, about two weeks of a line every ten seconds; then it becomes train.log.1, in place of the last one


def print_line(text: str) -> None:
    """To stderr at once; stdout is for results."""
    print(printable(text), file=sys.stderr, flush=True)


class RunLog:
    """The logs of the run in `folder`, opened for appending. Until the next one is opened, warnings of this package go to it as well.

    Of several processes only the first (`rank` 0) writes metrics and is heard; the others say what they say in `train-rankN.log`.
    A last line that a killed process left torn is dropped on opening. `echo` shows a line to the user; `TrainProgress`
    replaces it while its live bar is up, so that lines appear above the bar.
    """

    def __init__(
        self, folder: str | Path, echo: Callable[[str], None] = print_line, rank: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.echo = echo if rank == 0 else lambda text: None
        metrics, text = (
            "metrics.jsonl" if rank == 0 else os.devnull,
            f"train-rank{rank}.log" if rank else "train.log",
        )
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._metrics = open(self.folder / metrics, "a+b", buffering=0, opener=no_link)
            self._text = open(self.folder / text, "ab", buffering=0, opener=no_link)
        self.truncate_to(self._metrics.seek(0, os.SEEK_END))
        self._warnings = _Warnings(self)
        self._warnings.install()

    def metrics(self, kind: str, **values: Any) -> None:
        """Append one line `{"kind": kind, "time": seconds since the epoch, **values}` to metrics.jsonl."""
        line = json.dumps(
            plain({"kind": kind, "time": round(time.time(), 3), **values}), allow_nan=False
        )
        _append(self._metrics, line + "\n")

    def say(self, text: str, *, echo: bool = True) -> None:
        """Append a line to train.log and, unless `echo` is off, show it; control characters in it as escapes."""
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
        """Length of metrics.jsonl in bytes: what a checkpoint stores for `truncate_to`."""
        with _disk(self._metrics.name):
            return self._metrics.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Until what metrics.jsonl holds is on the disk."""
        with _disk(self._metrics.name):
            os.fsync(self._metrics.fileno())

    def truncate_to(self, offset: int) -> None:
        """Drop the lines after `offset` bytes (steps that a resumed run repeats), and a torn line before it."""
        with _disk(self._metrics.name):
            content = Path(self._metrics.name).read_bytes()
            kept = content.rfind(b"\n", 0, offset) + 1
            if kept != len(content):
                self._metrics.truncate(kept)

    def close(self) -> None:
        logging.getLogger("dad_fast").removeHandler(self._warnings)
        self._metrics.close()
        self._text.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def _disk(path: str | Path) -> Iterator[None]:
    """What the disk refuses in this block becomes a DataError."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, "go on with --resume auto") from error


def _append(file: FileIO, text: str) -> None:
    """The whole of it: nothing waits in a buffer, where a second attempt would fail while the process ends."""
    with _disk(file.name):
        rest = memoryview(text.encode())
        while rest:
            rest = rest[file.write(rest) :]


class _Warnings(logging.Handler):
    """Takes the place of the last run's handler, and of Python's own way of printing warnings, which would tear the live bar."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def install(self) -> None:
        logger = logging.getLogger("dad_fast")
        for other in [handler for handler in logger.handlers if isinstance(handler, _Warnings)]:
            logger.removeHandler(other)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._log.say(f"warning: {record.getMessage()}")


def read_metrics(folder: str | Path, kind: str = "") -> list[dict[str, Any]]:
    """The lines of `folder`/metrics.jsonl, of one kind if named; a missing file is an empty list, a torn last line is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if not kind or row["kind"] == kind]


def environment() -> dict[str, Any]:
    """Versions and hardware for run.json. Never fails: what cannot be found out is None or left out. No environment variables."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": num_cores(),
        "side_by_side": side_by_side(),
        "packages": versions,
        "git": _git_commit(Path(__file__).resolve().parents[2]),
        **_torch_facts(),
        "driver": _driver(),
    }


def _torch_facts() -> dict[str, Any]:
    try:
        import torch

        gpus = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
        return {
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpus": gpus,
        }
    except Exception as error:  # a broken driver must not stop a CPU run
        return {
            "threads": None,
            "cuda": None,
            "cudnn": None,
            "gpus": [],
            "torch_problem": str(error).partition("\n")[0],
        }


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no package, no driver, no GPU: all the same to a record
        return None


def _git_commit(root: Path) -> str | None:
    """Commit of the checkout at `root`, "+" where files differ; None for an installed package inside somebody else's repository.

    A copy of a checkout without its history is of the commit that DAD_FAST_COMMIT names.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("DAD_FAST_COMMIT") or None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
