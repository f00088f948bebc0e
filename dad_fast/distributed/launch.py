"""Launcher for `--nproc`: one command in several processes of this machine. Imports nothing heavy.

Own code rather than torchrun, which turns every exit code into 1: Slurm requeues on 75.

Every process runs the same command and finds its rank in the environment, by torchrun's names. The
processes meet in a file of a private folder, which needs no free port, and connect over the
loopback device. Each has its own session: Ctrl-C in the terminal reaches only this process, which
forwards it once, like every signal.
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
# Variable with the file where the processes meet.
STORE = "DAD_FAST_RENDEZVOUS"
# Variable with the id of the launching process.
LAUNCHED = "DAD_FAST_LAUNCHER"
# Seconds from the first failure until the remaining processes are killed.
GRACE = 60.0
# Exit codes of processes that were asked to stop.
STOPPED = (75, 130)
SIGNALLED = (-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT)


def run_processes(
    nproc: int, command: str, arguments: Sequence[str], lock: int | None = None
) -> int:
    """Run `dad-fast command arguments` in `nproc` processes and return their common exit code.

    Process 0 has the terminal. Output of the others goes to stderr with their number, but only the
    first failure shows its error. The first failure stops the others (SIGTERM; after GRACE seconds
    SIGKILL) and gives the exit code; a process killed by a signal counts as 1. Without a failure,
    the exit code is that of processes that were asked to stop, 75 or 130, or else 0.

    lock: a file descriptor that the processes hold open with this one.
    """
    with tempfile.TemporaryDirectory(prefix="dad-fast-") as folder:
        family = _Family()
        try:
            for rank in range(nproc):
                family.processes.append(
                    _Process(rank, nproc, command, arguments, Path(folder) / "rendezvous", lock)
                )
            return family.wait()
        finally:
            family.kill()


class _Process:
    """One process and its last error message."""

    def __init__(
        self,
        rank: int,
        nproc: int,
        command: str,
        arguments: Sequence[str],
        store: Path,
        lock: int | None,
    ) -> None:
        self.rank = rank
        self.nproc = nproc
        self.error = ""
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
            # The loopback device works also where the host name does not resolve.
            identity["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        self.popen = subprocess.Popen(
            [*PROGRAM, command, *arguments],
            env=os.environ | {name: str(value) for name, value in identity.items()},
            stderr=subprocess.PIPE if rank else None,
            stdin=None if rank == 0 else subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
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

    def print_failure(self) -> None:
        """Print the failure of this process. Process 0 prints its own, unless it was killed."""
        self.reader.join(2.0)
        code = self.popen.returncode
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            what = f"was killed by {signal.Signals(-code).name}{hint}; the others are stopped"
        elif self.rank:
            what = f"failed, the others are stopped: {self.error or f'exit code {code}'}"
        else:
            return
        process = f"process {self.rank} of {self.nproc} (counted from 0)"
        print(f"dad-fast: {process} {what}", file=sys.stderr, flush=True)


class _Family:
    def __init__(self) -> None:
        self.processes: list[_Process] = []
        self.first_failed: _Process | None = None
        self.asked_to_stop = False

    def wait(self) -> int:
        """Wait until all have ended and return their common exit code."""
        deadline = float("inf")
        with stop_requests(self.send) as stop:
            while any(process.code is None for process in self.processes):
                time.sleep(0.05)
                self.asked_to_stop = self.asked_to_stop or stop.error is not None
                if time.monotonic() > deadline:
                    self.send(signal.SIGKILL)
                elif deadline == float("inf") and any(process.code for process in self.processes):
                    deadline = time.monotonic() + GRACE
                    self.note_failure()
                    self.send(signal.SIGTERM)
                    self.asked_to_stop = True
        self.note_failure()
        if self.first_failed is not None:
            self.first_failed.print_failure()
            return max(1, self.first_failed.popen.returncode)
        ended = {process.popen.returncode for process in self.processes}
        if ended == {0}:
            return 0
        return stop.error.exit_code if stop.error else max(ended)

    def note_failure(self) -> None:
        """Remember the first process that failed.

        A process killed by a forwarded signal counts as a clean stop: it had nothing to save.
        """
        fine = [None, 0, *STOPPED]
        if self.asked_to_stop:
            fine += SIGNALLED
        failed = [process for process in self.processes if process.code not in fine]
        if failed and self.first_failed is None:
            self.first_failed = failed[0]

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.code is None:
                process.popen.send_signal(number)

    def kill(self) -> None:
        """Kill the remaining processes."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.popen.wait()


def end_with_launcher() -> None:
    """Send this process SIGTERM when its launcher dies, as torchrun does on SIGUSR1.

    Does nothing in a process that neither `run_processes` nor torchrun started.
    """
    parent = launcher()
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def launcher() -> int:
    """Return the process that started this one as one of several; 0 if it was started alone."""
    if started_here():
        return int(os.environ[LAUNCHED])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0


def number_of_processes(nproc: str) -> int:
    """Return `--nproc` as a number: auto is one per GPU, and 1 without GPUs."""
    if nproc != "auto":
        return int(nproc)
    import torch

    return max(1, torch.cuda.device_count())


def processes_of_run(nproc: str) -> int:
    """Return the processes of a run, also in one of them."""
    return int(os.environ["WORLD_SIZE"]) if is_worker() else number_of_processes(nproc)


def started_here() -> bool:
    """Return whether `run_processes` started this process."""
    return LAUNCHED in os.environ


def is_worker() -> bool:
    """Return whether `run_processes` or torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
