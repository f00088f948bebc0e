"""Run a sweep: check all runs, fill stores, train on worker processes, and write the tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
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
from dad_fast.locks import lock_folder
from dad_fast.loggers.progress import JobsProgress, format_seconds
from dad_fast.loggers.run_log import print_line
from dad_fast.methods.stores import SharedStore
from dad_fast.models.registry import teacher_settings
from dad_fast.report.page import write_report
from dad_fast.sweep.pool import Job, Pool, shared_parts
from dad_fast.sweep.runs import Run, Sweep, clear
from dad_fast.sweep.tables import print_tables, write_tables

GIB_PER_JOB = 2.0
ERRORS = {
    error.exit_code: error for error in (DadFastError, UsageError, EnvironmentProblem, DataError)
}


def run_sweep(sweep: Sweep, launch: Launch) -> int:
    """Do the runs that are left, after `check_paths`.

    Return the exit code: 0 when every run is done, else 1.
    """
    output = sweep.output
    # Workers inherit the lock: after a kill it is free when the last of them has saved.
    with lock_folder(output) as lock, stop_requests() as stop:
        failed = _train(sweep, launch, stop, lock)
    if stop.error:
        done = sum(run.record() is not None for run in sweep.runs)
        raise stop.error(
            f"stopped with {done} of {len(sweep.runs)} runs done; running ones are saved, "
            "continue with --resume auto"
        )
    if (output / "results.json").exists():
        print_tables(sweep)
        write_report(output)
        plot = "plot.svg, " if sweep.ablation else ""
        print_line(
            f"{output}: table.md, {plot}report.html, results.json, and a folder for each run, such "
            f"as {sweep.runs[0].folder}"
        )
    for name, why in failed.items():
        print_line(f"failed: {name}: {why}")
    return 1 if failed else 0


def job_devices(sweep: Sweep, launch: Launch) -> list[str]:
    """Return the device of each worker process."""
    device = sweep.config.device
    devices = list(launch.devices) or ([device] if device != "auto" else [])
    if not devices or any(name.startswith("cuda") for name in devices):
        # Counting devices creates no CUDA context, so this process takes no GPU memory.
        import torch

        count = torch.cuda.device_count()
        devices = devices or [f"cuda:{i}" for i in range(count)] or ["cpu"]
        for name in devices:
            if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= count:
                problem = f"--devices {name}: torch sees {count} CUDA devices; see dad-fast doctor"
                raise EnvironmentProblem(problem)
    count = launch.jobs or (_jobs_on_a_cpu(len(sweep.runs)) if devices == ["cpu"] else len(devices))
    return [devices[i % len(devices)] for i in range(count)]


def _jobs_on_a_cpu(num_runs: int) -> int:
    """Return two jobs per core, of one thread each, as far as the memory allows.

    With more jobs than cores, no run starts late and is left alone at the end.
    """
    return max(1, min(num_runs, 2 * num_cores(), int(memory_gib() / GIB_PER_JOB)))


def _train(sweep: Sweep, launch: Launch, stop: StopRequest, lock: int | None) -> dict[str, str]:
    """Do the runs that are left; return the reasons of those that failed."""
    output = sweep.output
    devices = job_devices(sweep, launch)
    (output / "logs").mkdir(parents=True, exist_ok=True)
    try:
        with JobsProgress() as progress:
            left = list(sweep.runs)
            if not launch.overwrite:
                left = [run for run in left if run.record() is None]
            with Pool(devices[: max(1, len(left))], output / "logs", lock) as pool:
                if left:
                    _check(sweep, left, launch, pool, stop, progress)
                if stop.error:
                    return {}
                if launch.overwrite:
                    clear(output)
                    (output / "logs").mkdir(exist_ok=True)
                atomic_write_text(output / "config.toml", to_toml(sweep.config))
                state = _State(sweep, left, stop, progress, len(devices))
                stores = _needed(sweep, left)
                jobs = [_store_job(store) for store in stores]
                # The longest runs first, so that none of them starts last and is left alone.
                longest_first = sorted(left, key=_num_epochs, reverse=True)
                jobs += [_run_job(run, launch, stores, state.teachers) for run in longest_first]
                pool.run(jobs, state.job_ended, stop, progress.update)
                write_tables(sweep, state.failed)
                return state.failed
    finally:
        _remove_if_new(output)


def _num_epochs(run: Run) -> float:
    return run.cfg.schedule.epochs + run.cfg.schedule.cooldown_epochs


def _check(
    sweep: Sweep,
    runs: Sequence[Run],
    launch: Launch,
    pool: Pool,
    stop: StopRequest,
    progress: JobsProgress,
) -> None:
    """Raise errors in the settings of any run, before anything is trained."""
    # One run per variant is enough, unless their checkpoints are compared with the settings.
    checked = {run.variant if not launch.resume else run.name: run for run in runs}.values()
    # Stores of one kind have one form, so one per kind is enough.
    stores = {store.kind: store for store in _needed(sweep, runs)}.values()
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
    """Return a SharedStore as JSON, for a worker on `device`."""
    return {
        "folder": store.folder,
        "kind": store.kind,
        "config": _toml(store.config, device),
        "launch": asdict(store.launch),
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
    """Return the options that a worker needs."""
    return {
        "resume": launch.resume,
        "allow_config_change": launch.allow_config_change,
        "preset": launch.preset,
        "command": launch.command,
        "both_batch_sizes": launch.both_batch_sizes,
    }


def _toml(cfg: Config, device: str) -> str:
    return to_toml(with_values(cfg, {"device": device}))


class _State:
    """State of a running sweep; logged after each job."""

    def __init__(
        self,
        sweep: Sweep,
        left: Sequence[Run],
        stop: StopRequest,
        progress: JobsProgress,
        num_workers: int,
    ) -> None:
        self.sweep, self.stop, self.progress = sweep, stop, progress
        self.num_workers = num_workers
        self.teachers = _Teachers(sweep.runs)
        self.failed: dict[str, str] = {}
        self._left = {run.name: run for run in left}
        self._begun, self._ended = time.monotonic(), 0
        self._epochs_done, self._epochs = 0.0, sum(map(_num_epochs, left))

    def job_ended(self, job: Job, answer: dict[str, Any], seconds: float) -> None:
        run = self._left.get(job.name)
        if run is not None:
            self._ended += 1
            self._epochs_done += _num_epochs(run)
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
        total = len(self.sweep.runs)
        number = total - len(self._left) + self._ended
        counted = f"[{number}/{total}] " if run is not None else ""
        self.progress.say(f"{counted}{job.name}: {text}")
        write_tables(self.sweep, self.failed)

    def _time_left(self) -> str:
        """Estimate by epochs while runs wait; later each run's own line shows its time left."""
        is_waiting = len(self._left) - self._ended > self.num_workers
        if not self._ended or not is_waiting:
            return ""
        seconds_per_epoch = (time.monotonic() - self._begun) / self._epochs_done
        left = seconds_per_epoch * (self._epochs - self._epochs_done)
        return f", about {format_seconds(left)} left"


class _Teachers:
    """Results of teachers, so that each is evaluated once in a sweep."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        for run in runs:
            record = run.record()
            if record is not None:
                self.learn(run.cfg, record)

    def learn(self, cfg: Config, record: dict[str, Any]) -> None:
        """Add the results of the teacher of a finished run."""
        if record.get("teacher"):
            self.of(cfg)[cfg.teacher.name] = record["teacher"]

    def of(self, cfg: Config) -> dict[str, Any]:
        """Return the records by `--teacher` that hold for a run with these settings."""
        student = replace(cfg.student, weights="", init_from="")
        others = (cfg.data, cfg.augment, student, cfg.precision, cfg.engine, cfg.eval)
        return self._known.setdefault(repr((*teacher_settings(cfg), *others)), {})


def _scores(record: dict[str, Any] | None) -> str:
    suites = record["suites"] if record is not None else {}
    return "".join(f"{name} {float(suite['top1']):.1f} %  " for name, suite in suites.items())


def _remove_if_new(output: Path) -> None:
    """Remove the logs if nothing else was written; the lock removes the folder."""
    if not (output / "config.toml").exists():
        for path in (output / "logs").glob("worker-*.log"):
            path.unlink(missing_ok=True)
        # A folder with other files stays.
        with suppress(OSError):
            (output / "logs").rmdir()
