"""Run a sweep: check every run, fill the stores, train on worker processes, and write the tables after each run."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dad_fast.config import Config, to_toml
from dad_fast.config.fields import with_values
from dad_fast.config.options import Launch
from dad_fast.cores import memory_gib, num_cores
from dad_fast.distributed.signals import StopRequest, stop_requests
from dad_fast.errors import DadFastError, DataError, EnvironmentProblem, UsageError
from dad_fast.files import atomic_write_text
from dad_fast.loggers.progress import JobsProgress, format_seconds
from dad_fast.loggers.run_log import print_line
from dad_fast.methods.stores import SharedStore
from dad_fast.report.page import write_report
from dad_fast.sweep.pool import Job, Pool, shared_parts
from dad_fast.sweep.runs import Run, Sweep, check_output, clear
from dad_fast.sweep.tables import print_tables, write_tables

GIB_PER_JOB = 2.0
LOCK_SECONDS = 60.0  # how long workers of a killed sweep may take to save
ERRORS = {
    error.exit_code: error for error in (DadFastError, UsageError, EnvironmentProblem, DataError)
}


def run_sweep(sweep: Sweep, launch: Launch) -> int:
    """Do the runs that are left. Returns the exit code: 0 when every run is done, 1 when some failed."""
    check_output(sweep, launch)
    output = sweep.output
    with stop_requests() as stop:
        failed = _train(sweep, launch, stop)
    if stop.error:
        done = sum(run.record() is not None for run in sweep.runs)
        raise stop.error(
            f"stopped with {done} of {len(sweep.runs)} runs done; what was under way is saved, continue with --resume auto"
        )
    if (output / "results.json").exists():
        print_tables(sweep)
        write_report(output)
        plot = "plot.svg, " if sweep.ablation else ""
        print_line(
            f"{output}: table.md, {plot}report.html, results.json, and a folder for each run"
        )
    for name, why in failed.items():
        print_line(f"failed: {name}: {why}")
    return 1 if failed else 0


def job_devices(sweep: Sweep, launch: Launch) -> list[str]:
    """The device of each worker process."""
    device = sweep.config.device
    devices = list(launch.devices) or ([device] if device != "auto" else [])
    if not devices or any(name.startswith("cuda") for name in devices):
        import torch  # counting creates no context, so that this process takes no memory of a GPU

        count = torch.cuda.device_count()
        devices = devices or [f"cuda:{i}" for i in range(count)] or ["cpu"]
        for name in devices:
            if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= count:
                problem = f"--devices {name}: torch sees {count} CUDA devices; see dad-fast doctor"
                raise EnvironmentProblem(problem)
    count = launch.jobs or (_jobs_on_a_cpu(len(sweep.runs)) if devices == ["cpu"] else len(devices))
    return [devices[i % len(devices)] for i in range(count)]


def _jobs_on_a_cpu(num_runs: int) -> int:
    """Two a core, as far as the memory allows, with one thread each.

    More runs than cores: none waits for the longest at the end, and beside other work they get a larger share of the cores.
    """
    return max(1, min(num_runs, 2 * num_cores(), int(memory_gib() / GIB_PER_JOB)))


def _train(sweep: Sweep, launch: Launch, stop: StopRequest) -> dict[str, str]:
    """Do the runs that are left; returns why those that failed did."""
    output = sweep.output
    devices = job_devices(sweep, launch)
    (output / "logs").mkdir(parents=True, exist_ok=True)
    try:
        with _locked(output, stop) as lock, JobsProgress() as progress:
            left = (
                list(sweep.runs)
                if launch.overwrite
                else [run for run in sweep.runs if run.record() is None]
            )
            with Pool(devices[: max(1, len(left))], output / "logs", lock) as pool:
                if left:
                    _check(sweep, left, launch, pool, stop, progress)
                if stop.error:
                    return {}
                if launch.overwrite:
                    clear(output)
                    (output / "logs").mkdir(exist_ok=True)
                atomic_write_text(output / "config.toml", to_toml(sweep.config))
                state = _State(sweep, left, stop, progress)
                stores = _needed(sweep, left)
                jobs = [_store_job(store) for store in stores]
                jobs += [_run_job(run, launch, stores, state.teachers) for run in left]
                pool.run(jobs, state.job_ended, stop, progress.update)
                write_tables(sweep, state.failed)
                return state.failed
    finally:
        _remove_if_new(output)


def _check(
    sweep: Sweep,
    runs: Sequence[Run],
    launch: Launch,
    pool: Pool,
    stop: StopRequest,
    progress: JobsProgress,
) -> None:
    """Raise what a user got wrong in any run, before anything is trained."""
    # One run a variant is enough, unless checkpoints are to be continued.
    checked = {run.variant if not launch.resume else run.name: run for run in runs}.values()
    stores = {
        store.kind: store for store in _needed(sweep, runs)
    }.values()  # those of a kind have one form
    unfilled = sweep.unfilled(launch.overwrite)

    def message(device: str) -> dict[str, Any]:
        described = [
            {
                "variant": run.variant,
                "config": _toml(run.cfg, device),
                "folder": str(run.folder),
                "unfilled": not unfilled.isdisjoint(run.cfg.store.dirs),
            }
            for run in checked
        ]
        return {
            "do": "check",
            "runs": described,
            "stores": [store_message(store, device) for store in stores],
            "launch": _launch(launch),
        }

    answers: list[dict[str, Any]] = []
    pool.run(
        [Job("check", message)],
        lambda job, answer, seconds: answers.append(answer),
        stop,
        progress.update,
    )
    progress.end("check")
    if not stop.error and "error" in answers[0]:
        raise ERRORS.get(answers[0]["exit_code"], DadFastError)(answers[0]["error"])


def _needed(sweep: Sweep, runs: Sequence[Run]) -> list[SharedStore]:
    return [
        store for store in sweep.stores if any(store.folder in run.cfg.store.dirs for run in runs)
    ]


def _store_job(store: SharedStore) -> Job:
    def message(device: str) -> dict[str, Any]:
        return {"do": "store", **store_message(store, device)}

    return Job(Path(store.folder).name, message, shared_parts(store.config))


def store_message(store: SharedStore, device: str) -> dict[str, Any]:
    """A SharedStore as JSON, for a worker on `device`."""
    launch = asdict(store.launch)
    return {
        "folder": store.folder,
        "kind": store.kind,
        "config": _toml(store.config, device),
        "launch": launch,
    }


def _run_job(run: Run, launch: Launch, stores: Sequence[SharedStore], teachers: _Teachers) -> Job:
    def message(device: str) -> dict[str, Any]:
        return {
            "do": "run",
            "variant": run.variant,
            "config": _toml(run.cfg, device),
            "folder": str(run.folder),
            "launch": _launch(launch),
            "teacher_results": teachers.of(run.cfg),
        }

    after = tuple(Path(store.folder).name for store in stores if store.folder in run.cfg.store.dirs)
    return Job(run.name, message, shared_parts(run.cfg), after)


def _launch(launch: Launch) -> dict[str, Any]:
    """What a worker needs of it."""
    return {
        "resume": launch.resume,
        "allow_config_change": launch.allow_config_change,
        "preset": launch.preset,
        "both_batch_sizes": launch.both_batch_sizes,
    }


def _toml(cfg: Config, device: str) -> str:
    return to_toml(with_values(cfg, {"device": device}))


class _State:
    """What is known of a sweep under way; told to the user after each job."""

    def __init__(
        self, sweep: Sweep, left: Sequence[Run], stop: StopRequest, progress: JobsProgress
    ) -> None:
        self.sweep, self.stop, self.progress = sweep, stop, progress
        self.teachers = _Teachers(sweep.runs)
        self.failed: dict[str, str] = {}
        self._left = {run.name: run for run in left}
        self._begun, self._ended = time.monotonic(), 0

    def job_ended(self, job: Job, answer: dict[str, Any], seconds: float) -> None:
        run = self._left.get(job.name)
        self._ended += run is not None
        self.progress.end(job.name)
        if "error" in answer and self.stop.error:
            self.progress.say(f"{job.name}: {answer['error']}")
            return
        if "error" in answer:
            self.failed[job.name] = answer["error"]
            text = f"failed: {answer['error']}"
        elif run is None:
            text = f"filled ({seconds:.0f} s{self._time_left()})"
        else:
            record = run.record()
            if record is not None:
                self.teachers.learn(run.cfg, record)
            text = f"{_scores(record)}({seconds:.0f} s{self._time_left()})"
        number = len(self.sweep.runs) - len(self._left) + self._ended
        counted = f"[{number}/{len(self.sweep.runs)}] " if run is not None else ""
        self.progress.say(f"{counted}{job.name}: {text}")
        write_tables(self.sweep, self.failed)

    def _time_left(self) -> str:
        left = len(self._left) - self._ended
        if not self._ended or not left:
            return ""
        return (
            f", about {format_seconds((time.monotonic() - self._begun) / self._ended * left)} left"
        )


class _Teachers:
    """The accuracy of teachers, so that each is evaluated once in a sweep."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        for run in runs:
            if record := run.record():
                self.learn(run.cfg, record)

    def learn(self, cfg: Config, record: dict[str, Any]) -> None:
        if record.get("teacher"):
            self.of(cfg)[record["teacher"]["name"]] = record["teacher"]["suites"]

    def of(self, cfg: Config) -> dict[str, Any]:
        student = replace(cfg.student, weights="", init_from="")
        view = (cfg.teacher, cfg.data, cfg.augment, student, cfg.precision, cfg.engine, cfg.eval)
        return self._known.setdefault(repr(view), {})


def _scores(record: dict[str, Any] | None) -> str:
    suites = (record or {"suites": {}})["suites"]
    return "".join(f"{name} {float(suite['top1']):.1f} %  " for name, suite in suites.items())


def _remove_if_new(output: Path) -> None:
    """Remove a folder in which nothing was begun."""
    if not (output / "config.toml").exists():
        for path in [*(output / "logs").glob("worker-*.log"), output / ".lock"]:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            (output / "logs").rmdir()
            output.rmdir()


@contextmanager
def _locked(output: Path, stop: StopRequest) -> Iterator[int]:
    """One sweep at a time in a folder. Workers hold the lock too: after a kill it is free when the last of them has saved."""
    handle = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        waited_from = time.monotonic()
        while not stop.error:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - waited_from > LOCK_SECONDS:
                    raise UsageError(
                        f"--output {output}: another sweep runs in it; wait for it, or stop it"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                problem = f"{output}: this file system has no locks ({error.strerror})"
                raise DataError(f"{problem}; name a folder on another") from None
        yield handle
    finally:
        os.close(handle)
