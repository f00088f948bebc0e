"""The worker processes of a sweep: one job each at a time, from one queue. Imports no torch, so it holds no GPU memory."""

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

WORKER = "dad_fast.sweep.worker"
ROOT = (
    Path(__file__).resolve().parents[2]
)  # of the checkout or of site-packages: where workers find this package


def shared_parts(cfg: Config) -> str:
    """Equal for runs that share what a worker has loaded. Features of views are large, so only equal ones are shared."""
    views = (cfg.augment, cfg.seed) if METHODS[cfg.method].linear_probe else ()
    return repr(
        (cfg.data, cfg.teacher, cfg.discretizer, cfg.precision, cfg.engine, cfg.eval, *views)
    )


Done = Callable[["Job", dict[str, Any], float], None]
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Job:
    name: str
    message: Callable[[str], dict[str, Any]]  # device -> what the worker gets
    group: str = ""  # jobs of a group share what a worker has loaded
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
    """A context manager that ends its workers. A run under way is saved first, unless a second Ctrl-C came."""

    def __init__(
        self,
        devices: Sequence[str],
        logs: Path | None,
        lock: int | None = None,
        threads_for: int = 0,
    ) -> None:
        """devices: one entry per process. logs: folder of the workers' logs; None = they are not kept.

        lock: a file descriptor that workers hold open with their parent.
        threads_for: how many processes share the cores; 0 = as many as there are devices.
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
        """Do all jobs, in their order where workers and dependencies allow; `done(job, answer, seconds)` after each.

        An answer with "error" is a failure, also of the jobs that need this one. When a stop is requested,
        workers save and end, and this returns without the jobs that are left.
        progress: gets the job's name, the work done, the work in all, and a text, about once a second.
        """
        self._progress = progress
        pending, failed, finished = list(jobs), set[str](), set[str]()

        def end(job: Job, answer: dict[str, Any], seconds: float) -> None:
            (failed if "error" in answer else finished).add(job.name)
            done(job, answer, seconds)

        while not stop.error:
            for job in [job for job in pending if failed & set(job.after)]:
                pending.remove(job)
                end(job, {"error": f"{min(failed & set(job.after))} failed", "exit_code": 1}, 0.0)
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
        while any(
            worker.job is not None for worker in self.workers
        ):  # until each has saved what it had
            self._receive(end)

    def _send(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.group, worker.started = job, job.group, time.monotonic()
        if worker.process is None or worker.process.poll() is not None:
            worker.process = self._start(worker)
        assert worker.process.stdin is not None
        with suppress(BrokenPipeError):  # the reader's thread tells that it died
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
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        log = (
            open(self.logs / f"worker-{worker.number}.log", "a", opener=no_link)
            if self.logs is not None
            else subprocess.DEVNULL
        )
        # A session of its own: Ctrl-C reaches the sweep's process alone, which asks the workers to save.
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
        if not isinstance(log, int):
            log.close()
        threading.Thread(target=self._read, args=(worker, process), daemon=True).start()
        return process

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
            return  # a worker that ended after its answer
        if answer is not None and "progress" in answer:
            self._progress(job.name, *answer["progress"])
            return
        if answer is None:
            how = (
                f"signal {signal.Signals(-process.returncode).name}"
                if process.returncode < 0
                else f"exit code {process.returncode}"
            )
            log = (
                f"; see {self.logs / f'worker-{worker.number}.log'}"
                if self.logs is not None
                else ""
            )
            answer = {"error": f"its process died ({how}){log}", "exit_code": 1}
        worker.job = None
        end(job, answer, time.monotonic() - worker.started)
