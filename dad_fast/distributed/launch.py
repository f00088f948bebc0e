"""One command in several processes of this machine: `--nproc`. Imports nothing heavy.

Every process runs the same command and learns from its environment who it is, with the names that torchrun uses. They meet in a file of
a private folder, so that no port has to be found; what they then talk over they choose themselves, on the loopback device. Each has
a session of its own: a Ctrl-C in the terminal reaches this process alone, which passes it on once, as it does with every signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dad_fast.cores import num_cores
from dad_fast.distributed.signals import stop_requests

PROGRAM = (sys.executable, "-m", "dad_fast")
STORE = "DAD_FAST_RENDEZVOUS"  # the file where the processes meet
LAUNCHED = "DAD_FAST_LAUNCHER"  # the process that started this one
GRACE = 60.0  # seconds from the first failure until those that are still there are killed
STOPPED = (75, 130)  # exit codes of processes that were asked to stop


def run_processes(nproc: int, verb: str, arguments: Sequence[str]) -> int:
    """Runs `dad-fast verb arguments` in `nproc` processes; returns the exit code of them all.

    Process 0 has the terminal. What the others say goes to stderr with their number before it, but of their errors only that of the
    first to fail is shown. The first failure stops the others (SIGTERM; after GRACE seconds SIGKILL) and gives the exit code; a
    process that a signal killed counts as 1. Where nobody failed and some were asked to stop it is theirs, 75 or 130.
    """
    with tempfile.TemporaryDirectory(prefix="dad-fast-") as folder:
        family = _Family()
        try:
            for rank in range(nproc):
                family.processes.append(
                    _Process(rank, nproc, verb, arguments, Path(folder) / "rendezvous")
                )
            return family.wait()
        finally:
            family.kill()


class _Process:
    """One of the processes, and what it said last."""

    def __init__(
        self, rank: int, nproc: int, verb: str, arguments: Sequence[str], store: Path
    ) -> None:
        self.rank, self.nproc, self.error = rank, nproc, ""
        identity = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": nproc,
            "LOCAL_WORLD_SIZE": nproc,
            STORE: store,
            LAUNCHED: os.getpid(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, num_cores() // nproc)),
        }
        if sys.platform == "linux":
            identity["GLOO_SOCKET_IFNAME"] = os.environ.get(
                "GLOO_SOCKET_IFNAME", "lo"
            )  # needs no name that resolves
        self.popen = subprocess.Popen(
            [*PROGRAM, verb, *arguments],
            env=os.environ | {name: str(value) for name, value in identity.items()},
            stderr=subprocess.PIPE if rank else None,
            stdin=None if rank == 0 else subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.popen.stderr or ():
            if line.startswith("dad-fast: "):
                self.error = line.strip().removeprefix("dad-fast: ")
            else:
                print(f"[{self.rank}] {line}", end="", file=sys.stderr, flush=True)

    @property
    def code(self) -> int | None:
        return self.popen.poll()

    def say_why(self) -> None:
        """What this process, the first to fail, failed of; process 0 has said it itself unless it was killed."""
        self.reader.join(2.0)
        code, who = (
            self.popen.returncode,
            f"dad-fast: process {self.rank} of {self.nproc} (counted from 0)",
        )
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            print(
                f"{who} was killed by {signal.Signals(-code).name}{hint}; the others are stopped",
                file=sys.stderr,
                flush=True,
            )
        elif self.rank:
            print(
                f"{who} failed, the others are stopped: {self.error or f'exit code {code}'}",
                file=sys.stderr,
                flush=True,
            )


class _Family:
    def __init__(self) -> None:
        self.processes: list[_Process] = []
        self.first: _Process | None = None  # the first that failed
        self.asked = False  # whether all were asked to stop

    def wait(self) -> int:
        """Until all have ended."""
        deadline = float("inf")
        with stop_requests(self.send) as stop:
            while any(process.code is None for process in self.processes):
                time.sleep(0.05)
                self.asked = self.asked or stop.error is not None
                if time.monotonic() > deadline:
                    self.send(signal.SIGKILL)
                elif deadline == float("inf") and any(process.code for process in self.processes):
                    deadline = time.monotonic() + GRACE
                    self.note_failure()
                    self.send(signal.SIGTERM)
                    self.asked = True
        self.note_failure()
        if self.first is not None:
            self.first.say_why()
            return max(1, self.first.popen.returncode)
        ended = {process.popen.returncode for process in self.processes}
        return 0 if ended == {0} else stop.error.exit_code if stop.error else max(ended)

    def note_failure(self) -> None:
        """Whoever ends by a signal that was sent on was asked to stop when it had nothing to save, or nothing left to save."""
        fine = (
            None,
            0,
            *STOPPED,
            *((-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT) if self.asked else ()),
        )
        failed = [process for process in self.processes if process.code not in fine]
        if failed and self.first is None:
            self.first = failed[0]

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.code is None:
                process.popen.send_signal(number)

    def kill(self) -> None:
        """Whatever is left, when this process is made to end."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.popen.wait()


def end_with_launcher() -> None:
    """In a process that `run_processes` or torchrun started: should the launcher itself be killed, as torchrun is by a SIGUSR1, this one
    is asked to stop as by SIGTERM.
    """
    if started_here():
        launcher = int(os.environ[LAUNCHED])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
    else:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def number_of_processes(nproc: str) -> int:
    """`--nproc` as a number: auto is one a GPU, and 1 without GPUs."""
    if nproc != "auto":
        return int(nproc)
    import torch

    return max(1, torch.cuda.device_count())


def started_here() -> bool:
    """Whether this process is one of `run_processes`."""
    return LAUNCHED in os.environ


def is_worker() -> bool:
    """Whether this process is one of several already: of `run_processes` or of torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
