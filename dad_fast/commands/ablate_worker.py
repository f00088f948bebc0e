"""One process of a sweep: takes jobs as JSON lines on stdin, does one after the other, and answers each with a JSON line on stdout.

    {"do": "check", "runs": {cell: TOML}, "stores": [store]}    what a user got wrong shows here, before anything is trained
    {"do": "measure", "runs": {cell: TOML}, "stored": {cell: [kind]}, "stores": {folder: store}}    seconds, for the plan's cost
    {"do": "store", "config": TOML, "launch": {...}}    fill a store that runs will learn from
    {"do": "run", "config": TOML, "cell", "folder", "preset", "taught"}    train and judge a cell with a seed, or what is left of that

An answer has "error" and "exit_code" where the job failed. Data, teacher and discretizer stay loaded from job to job while they are the
same. When stdin ends, the sweep's own process is gone: a run that is under way is saved, and the worker ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from dad_fast.commands import precompute, train
from dad_fast.commands.ablate_measure import measure
from dad_fast.commands.ablate_pool import shared_parts
from dad_fast.config import Config, Launch, from_toml
from dad_fast.config.launch import StoreLaunch
from dad_fast.engine.build import Builder
from dad_fast.engine.signals import ends_at_once, stop_requests
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import DadFastError, Interrupted, Preempted
from dad_fast.evaluate.runner import open_suites
from dad_fast.observe.runlog import print_line

BROKEN = 70  # exit code after a failure that may have broken more than its job, such as one of CUDA: the next job gets a new process


class Worker:
    def __init__(self) -> None:
        self._shared: tuple[str, Builder, dict[str, Any]] = ("", Builder(), {})

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        return dict(getattr(self, job.pop("do"))(**job) or {})

    def check(self, runs: dict[str, str], stores: list[dict[str, Any]]) -> None:
        for cell, text in runs.items():
            cfg = from_toml(text)
            try:
                builder, _ = self._parts_of(cfg)
                parts = builder.build(cfg)
                open_suites(cfg.eval.suites, cfg.data, parts.train.classes, cfg.eval)
                Trainer(cfg, parts, Path("nothing is written"), "")
            except DadFastError as error:
                raise type(error)(f"{cell}: {error}") from None
        for store in stores:
            precompute.make_filler(from_toml(store["config"]), StoreLaunch(**store["launch"]))

    def measure(self, runs: dict[str, str], stored: dict[str, list[str]], stores: dict[str, Any]) -> dict[str, Any]:
        forms = {cell: (from_toml(text), stored.get(cell, [])) for cell, text in runs.items()}
        fills = {folder: (from_toml(store["config"]), StoreLaunch(**store["launch"])) for folder, store in stores.items()}
        return measure(forms, fills, lambda cfg: self._parts_of(cfg)[0])

    def store(self, config: str, launch: dict[str, Any]) -> None:
        precompute.run(from_toml(config), StoreLaunch(**launch), [])

    def run(self, cell: str, config: str, folder: str, preset: str, taught: dict[str, Any]) -> None:
        cfg = from_toml(config)
        builder, known = self._parts_of(cfg)
        known.update(taught)
        suites = open_suites(cfg.eval.suites, cfg.data, builder.build(cfg).train.classes, cfg.eval)
        launch = Launch(output=folder, resume="auto", preset=preset)
        train.one_run(cell, cfg, Path(folder), f"{cell} seed {cfg.seed}", launch, builder, suites, known)

    def _parts_of(self, cfg: Config) -> tuple[Builder, dict[str, Any]]:
        """The parts that runs share, and what is known of the teacher's accuracy; let go where the next run needs others."""
        key = repr((shared_parts(cfg), cfg.device))
        if self._shared[0] != key:
            self._shared = (key, Builder(), {})
        return self._shared[1:]


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed belongs to the log
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(jobs, busy), daemon=True).start()
    worker = Worker()
    with stop_requests():  # but while a job has nothing to save
        while (job := jobs.get()) is not None:
            busy.set()
            answer, code = _answer(worker, job)
            busy.clear()
            answers.write(json.dumps(answer) + "\n")
            if code is not None:
                return code
    return 0


def _answer(worker: Worker, job: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """What is said of a job, and the exit code where no further job is taken."""
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
        return {"error": " ".join(f"{type(error).__name__}: {error}".split()), "exit_code": 1}, BROKEN


def _listen(jobs: queue.Queue[dict[str, Any] | None], busy: threading.Event) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
