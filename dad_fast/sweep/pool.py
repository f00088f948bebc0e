"""Worker processes of a sweep: one queue, one job per process at a time.

Imports no torch, so that the parent process holds no GPU memory.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dad_fast.config import Config
from dad_fast.cores import SIDE_BY_SIDE, num_cores
from dad_fast.distributed.signals import StopRequest
from dad_fast.files import no_link
from dad_fast.methods.registry import METHODS
from dad_fast.models.registry import teacher_settings

WORKER = "dad_fast.sweep.worker"
# The checkout or site-packages, where workers find this package.
ROOT = Path(__file__).resolve().parents[2]


def shared_parts(cfg: Config) -> str:
    """Return a key that is equal for runs that can share a worker's loaded data and models.

    Features of augmented views are large, so linear probes share them only if they are equal.
    """
    views = (cfg.augment, cfg.seed) if METHODS[cfg.method].linear_probe else ()
    models = (*teacher_settings(cfg), cfg.discretizer)
    return repr((cfg.data, *models, cfg.precision, cfg.engine, cfg.eval, *views))


# (job, answer, seconds) -> jobs to do in its place, if any
Done = Callable[["Job", dict[str, Any], float], "Sequence[Job] | None"]
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Job:
    name: str
    message: Callable[[str], dict[str, Any]]  # device -> what the worker gets
    group: str = ""  # jobs of a group share a worker's loaded data and models
    after: tuple[str, ...] = ()  # names of jobs that must be done before


@dataclass
class _Worker:
    number: int
    device: str
    process: subprocess.Popen[str] | None = None
    job: Job | None = None
    group: str = ""
    started: float = 0.0


class Pool:
    """Worker processes, as a context manager that ends them.

    A running job is saved first, unless the user pressed Ctrl-C twice.
    """

    def __init__(
        self,
        devices: Sequence[str],
        logs: Path | None,
        lock: int | None = None,
        threads_for: int = 0,
    ) -> None:
        """Describe the workers; they start with their first job.

        devices: one entry per process.
        logs: folder of the workers' logs; None = logs are discarded.
        lock: a file descriptor that workers hold open with their parent.
        threads_for: number of processes that share the cores; 0 = as many as devices.
        """
        self.workers = [_Worker(number, device) for number, device in enumerate(devices)]
        self.logs, self.lock, self.shares = logs, lock, threads_for or len(devices)
        self._events: queue.Queue[tuple[_Worker, subprocess.Popen[str], dict[str, Any] | None]] = (
            queue.Queue()
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        running = [worker for worker in self.workers if worker.process is not None]
        for worker in running:
            assert worker.process is not None and worker.process.stdin is not None
            if kind is KeyboardInterrupt:
                worker.process.kill()
            elif worker.job is not None:
                worker.process.terminate()
            with suppress(BrokenPipeError):
                worker.process.stdin.close()
        for worker in running:
            assert worker.process is not None
            worker.process.wait()

    def run(
        self,
        jobs: Sequence[Job],
        done: Done,
        stop: StopRequest,
        progress: Progress = lambda *_: None,
    ) -> None:
        """Do all jobs in their order, as far as dependencies allow.

        done: called with (job, answer, seconds) after each job; may return jobs to do in its
            place. Otherwise an answer with "error" is a failure, and so are the jobs that need
            this one.
        stop: when a stop is requested, the workers save and end, and the jobs that are left are not
            done.
        progress: called about once a second with a job's name, work done, total work, and a text.

        A worker prefers jobs of the group whose data and models it has loaded.
        """
        self._progress = progress
        pending, failed, finished = list(jobs), set[str](), set[str]()

        def end(job: Job, answer: dict[str, Any], seconds: float) -> None:
            instead = list(done(job, answer, seconds) or ())
            pending[:0] = instead
            if not instead:
                (failed if "error" in answer else finished).add(job.name)

        while not stop.error:
            for job in list(pending):
                failed_before = failed & set(job.after)
                if failed_before:
                    pending.remove(job)
                    end(job, {"error": f"{min(failed_before)} failed", "exit_code": 1}, 0.0)
            for worker in self.workers:
                ready = [job for job in pending if finished.issuperset(job.after)]
                if worker.job is None and ready:
                    job = next((job for job in ready if job.group == worker.group), ready[0])
                    pending.remove(job)
                    self._send(worker, job)
            if not pending and all(worker.job is None for worker in self.workers):
                return
            self._receive(end)
        for worker in self.workers:
            if worker.job is not None and worker.process is not None:
                worker.process.terminate()
        # Wait until each worker has saved its run.
        while any(worker.job is not None for worker in self.workers):
            self._receive(end)

    def _send(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.group, worker.started = job, job.group, time.monotonic()
        if worker.process is None or worker.process.poll() is not None:
            worker.process = self._start(worker)
        assert worker.process.stdin is not None
        # If the process died, the thread that reads its answers reports it.
        with suppress(BrokenPipeError):
            worker.process.stdin.write(json.dumps(job.message(worker.device)) + "\n")
            worker.process.stdin.flush()

    def _start(self, worker: _Worker) -> subprocess.Popen[str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // self.shares)))
        environment[SIDE_BY_SIDE] = str(self.shares)
        search_path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
        log: Any = subprocess.DEVNULL
        if self.logs is not None:
            log = open(self._log_of(worker), "a", opener=no_link)
        # In a session of its own: Ctrl-C reaches the parent alone, which asks workers to save.
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
            pass_fds=() if self.lock is None else (self.lock,),
        )
        if self.logs is not None:
            log.close()
        threading.Thread(target=self._read, args=(worker, process), daemon=True).start()
        return process

    def _log_of(self, worker: _Worker) -> Path:
        assert self.logs is not None
        return self.logs / f"worker-{worker.number}.log"

    def _read(self, worker: _Worker, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._events.put((worker, process, json.loads(line)))
        process.wait()
        self._events.put((worker, process, None))

    def _receive(self, end: Callable[[Job, dict[str, Any], float], None]) -> None:
        try:
            worker, process, answer = self._events.get(timeout=0.2)
        except queue.Empty:
            return
        job = worker.job
        if job is None or process is not worker.process:
            # The process ended after its answer.
            return
        if answer is not None and "progress" in answer:
            self._progress(job.name, *answer["progress"])
            return
        if answer is None:
            code = process.returncode
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            log = f"; see {self._log_of(worker)}" if self.logs is not None else ""
            answer = {"error": f"its process died ({how}){log}", "exit_code": 1}
        worker.job = None
        end(job, answer, time.monotonic() - worker.started)
