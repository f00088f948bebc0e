"""One worker process of a sweep: reads jobs from stdin and writes answers to stdout, as JSON lines.

    {"do": "check", "runs": [run], "stores": [store], "launch"}
        Raise errors in settings, before anything is trained.
    {"do": "measure", "runs": {variant: TOML}, "stored": {variant: [kind]}, "stores": [store]}
        Return seconds, for the dry run.
    {"do": "store", "folder", "kind", "config": TOML, "launch"}
        Fill a store that runs learn from.
    {"do": "run", "runs": [{"variant", "config": TOML, "folder"}], "launch", "teacher_results"}
        Train and evaluate runs that share their batches.

Lines {"progress": [done, total, text]} come before the answer. An answer has "error" and
"exit_code" if the job failed. Data, teacher and discretizer stay loaded while consecutive jobs use
the same ones. The end of stdin means that the parent is gone: the worker saves its run and ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from dad_fast.config import Config, Launch, from_toml
from dad_fast.config.options import StoreLaunch
from dad_fast.distributed.signals import ends_at_once, stop_requests
from dad_fast.engine.build import Builder
from dad_fast.errors import DadFastError, Interrupted, Preempted
from dad_fast.loggers.progress import report_progress, report_progress_to
from dad_fast.loggers.run_log import print_line
from dad_fast.methods.stores import SharedStore
from dad_fast.precompute.run import make_builder
from dad_fast.sweep.measure import measure
from dad_fast.sweep.pool import shared_parts
from dad_fast.sweep.run import check_run, fill_store, train_runs
from dad_fast.sweep.runs import Run

# Exit code after an unexpected failure. It may have broken the process, as CUDA errors do, so the
# next job gets a new one.
BROKEN = 70


class Worker:
    """The jobs, one method each, and the models and data that they share."""

    def __init__(self) -> None:
        self._shared: tuple[str, Builder, dict[str, Any]] = ("", Builder(), {})

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        return dict(getattr(self, job.pop("do"))(**job) or {})

    def check(
        self, runs: list[dict[str, Any]], stores: list[dict[str, Any]], launch: dict[str, Any]
    ) -> None:
        for number, run in enumerate(runs):
            report_progress(number, len(runs), run["variant"])
            cfg = from_toml(run["config"])
            try:
                builder, _ = self._parts_of(cfg)
                check_run(
                    cfg, Path(run["folder"]), Launch(output="", **launch), builder, run["unfilled"]
                )
            except DadFastError as error:
                raise type(error)(f"{run['variant']}: {error}") from None
        for store in map(_store, stores):
            make_builder(store.config, store.launch)

    def measure(
        self, runs: dict[str, str], stored: dict[str, list[str]], stores: list[dict[str, Any]]
    ) -> dict[str, Any]:
        configs = {variant: from_toml(text) for variant, text in runs.items()}
        return measure(
            configs, stored, list(map(_store, stores)), lambda cfg: self._parts_of(cfg)[0]
        )

    def store(self, **store: Any) -> None:
        fill_store(_store(store))

    def run(
        self, runs: list[dict[str, Any]], launch: dict[str, Any], teacher_results: dict[str, Any]
    ) -> None:
        group = []
        for run in runs:
            cfg = from_toml(run["config"])
            group.append(Run(run["variant"], cfg.seed, cfg, Path(run["folder"])))
        builder, known = self._parts_of(group[0].cfg)
        known.update(teacher_results)
        labels = [run.name for run in group]
        options = Launch(output=str(group[0].folder), **launch)
        train_runs(group, labels, options, builder, known)

    def _parts_of(self, cfg: Config) -> tuple[Builder, dict[str, Any]]:
        """Return the shared parts and teacher results; drop them if the next run needs others."""
        key = repr((shared_parts(cfg), cfg.device))
        if self._shared[0] != key:
            self._shared = (key, Builder(), {})
        return self._shared[1:]


def _store(message: dict[str, Any]) -> SharedStore:
    launch = StoreLaunch(**message["launch"])
    return SharedStore(message["folder"], message["kind"], from_toml(message["config"]), launch)


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Everything else that is printed belongs to the log.
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        # A parent that was killed reads nothing. `_listen` notices, perhaps later, and the run must
        # last until it is saved.
        with suppress(BrokenPipeError):
            answers.write(json.dumps(message) + "\n")

    report_progress_to(lambda *state: send({"progress": state}))
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(jobs, busy), daemon=True).start()
    worker = Worker()
    # A job that has nothing to save ends at once instead (ends_at_once).
    with stop_requests():
        while (job := jobs.get()) is not None:
            busy.set()
            answer, code = _answer(worker, job)
            busy.clear()
            send(answer)
            if code is not None:
                return code
    return 0


def _answer(worker: Worker, job: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Do a job; return its answer, and an exit code if the worker ends."""
    try:
        with ends_at_once("stopped"):
            return worker.do(job), None
    except (Preempted, Interrupted) as error:
        return {"error": str(error), "exit_code": error.exit_code}, error.exit_code
    except DadFastError as error:
        print_line(f"error: {error}")
        return {"error": str(error), "exit_code": error.exit_code}, None
    except Exception as error:
        traceback.print_exc()
        one_line = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": one_line, "exit_code": 1}, BROKEN


def _listen(jobs: queue.Queue[dict[str, Any] | None], busy: threading.Event) -> None:
    """Queue the jobs from stdin; when it ends, end the process and save a running job."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
