"""`dad-fast ablate`: every cell of a sweep with every seed, on several processes, and what comes of it as one table and one plot."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dad_fast.commands.ablate_plan import print_plan
from dad_fast.commands.ablate_pool import Job, Pool, shared_parts
from dad_fast.config import Config, differences, expand, from_toml, to_toml
from dad_fast.config.ablation import Plan, SharedStore, identity
from dad_fast.config.fields import with_values
from dad_fast.config.variants import with_batch_sizes
from dad_fast.engine.signals import StopRequest, stop_requests
from dad_fast.errors import DadFastError, DataError, EnvironmentProblem, UsageError
from dad_fast.evaluate.ablation import ablation_markdown, print_ablation, summary
from dad_fast.evaluate.table import read_record
from dad_fast.files import atomic_write_json, atomic_write_text
from dad_fast.flags.ablate import SweepLaunch
from dad_fast.observe.forest import forest_plot
from dad_fast.observe.progress import format_seconds
from dad_fast.observe.report import write_report
from dad_fast.observe.runlog import print_line

LOCK_SECONDS = 60.0  # how long workers of a killed sweep may take to save
ENVIRONMENT = ("python", "platform", "cpu", "cpus", "packages", "git", "threads", "cuda", "cudnn", "gpus", "driver")
EXIT_CODES = {error.exit_code: error for error in (DadFastError, UsageError, EnvironmentProblem, DataError)}


def run(plan: Plan, launch: SweepLaunch) -> int:
    """Returns the exit code: 0 when every cell is done, 1 when some failed; the others are done nevertheless."""
    output = Path(launch.output)
    _check_output(output, plan, launch)
    runs = [Run(name, seed, cfg, output / name / f"seed-{seed}") for name, seed, cfg in expand(plan.config)]
    devices = _devices(launch)
    left = [one for one in runs if one.record() is None]
    with stop_requests() as stop:
        if launch.dry_run:
            return print_plan(plan, runs, left, devices, launch, stop)
        failed = _train(plan, runs, left, devices, launch, stop)
    if stop.error:
        done = sum(one.record() is not None for one in runs)
        raise stop.error(f"stopped with {done} of {len(runs)} runs done; what was under way is saved, go on with --resume auto")
    if (output / "results.json").exists():
        print_ablation(read_record(output / "results.json"))
        write_report(output)
        print_line(f"{output}: table.md, plot.svg, report.html, results.json, and a folder a run")
    for name, why in failed.items():
        print_line(f"failed: {name}: {why}")
    return 1 if failed else 0


class Run:
    """One cell with one seed, and its folder."""

    def __init__(self, cell: str, seed: int, cfg: Config, folder: Path) -> None:
        self.cell, self.seed, self.cfg, self.folder = cell, seed, cfg, folder
        self.name = f"{cell} seed {seed}"

    def record(self) -> dict[str, Any] | None:
        """results.json of a run that is finished and judged with these settings, else None. A run writes config.toml before it begins."""
        results, config = self.folder / "results.json", self.folder / "config.toml"
        try:
            record: dict[str, Any] = json.loads(results.read_text())
            made = from_toml(config.read_text(encoding="utf-8"), str(config))
            later = results.stat().st_mtime_ns >= config.stat().st_mtime_ns
        except (OSError, ValueError, RecursionError, UsageError):
            return None
        same = identity(with_batch_sizes(made, 1)) == identity(with_batch_sizes(self.cfg, 1)) and made.seed == self.seed
        whole = isinstance(record, dict) and {"seed", "seconds", "epochs", "suites"} <= set(record)
        return record if whole and later and same and made.eval.suites == self.cfg.eval.suites else None


def _check_output(output: Path, plan: Plan, launch: SweepLaunch) -> None:
    """An existing sweep is continued when asked for and when its base is the same; another folder is never touched."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    file = output / "config.toml"
    names = sorted({path.name for path in output.iterdir()} - {".lock", "logs"})
    if not names:
        return
    if not file.exists():
        raise UsageError(f"--output {output} is not empty and holds no sweep ({names[0]}); name another folder")
    if not launch.resume:
        if launch.dry_run:
            return
        raise UsageError(f"--output {output} exists; go on with --resume auto, or name another folder")
    old = from_toml(file.read_text(encoding="utf-8"), str(file))
    changed = differences(_base(old, plan.base), _base(plan.config, plan.base))
    if changed:
        raise UsageError(f"--resume: not the base of {output}: {'; '.join(changed)}; restore it, or name another folder")


def _base(cfg: Config, name: str) -> Config:
    return with_values(cfg, {**cfg.variants.get(name, {}), "variants": {}})


def _devices(launch: SweepLaunch) -> list[str]:
    """One entry per process."""
    devices = list(launch.devices)
    if not devices or any(name.startswith("cuda") for name in devices):
        import torch  # counting makes no context, so that this process takes no memory of a GPU

        devices = devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        for name in devices:
            if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
                raise EnvironmentProblem(f"--devices {name}: torch sees {torch.cuda.device_count()} CUDA devices; see dad-fast doctor")
    return [devices[i % len(devices)] for i in range(launch.jobs or len(devices))]


def _train(
    plan: Plan, runs: Sequence[Run], left: Sequence[Run], devices: Sequence[str], launch: SweepLaunch, stop: StopRequest
) -> dict[str, str]:
    """Do the runs that are left; returns why those that failed did. The tables are written again after each."""
    output = Path(launch.output)
    (output / "logs").mkdir(parents=True, exist_ok=True)
    told = _Told(plan, runs, left, output, stop)
    jobs = [_store_job(store) for store in plan.stores if any(store.folder in one.cfg.store.dirs for one in left)]
    jobs += [_run_job(one, launch, told.taught) for one in left]
    try:
        with _locked(output, stop) as lock, Pool(devices, output / "logs", lock) as pool:
            if left:
                _check_parts(plan, left, pool, stop)
            if not stop.error:
                atomic_write_text(output / "config.toml", to_toml(plan.config))
                pool.run(jobs, told.job_ended, stop)
                told.write()
    finally:
        _remove_if_new(output)
    return told.failed


def _check_parts(plan: Plan, runs: Sequence[Run], pool: Pool, stop: StopRequest) -> None:
    """Whatever a user got wrong in any cell shows here, before anything is trained."""
    cells = {one.cell: one.cfg for one in runs}
    stores = {store.kind: store for store in plan.stores}.values()  # those of a kind have one form

    def message(device: str) -> dict[str, Any]:
        online = {name: _toml(_online(cfg), device) for name, cfg in cells.items()}
        return {"do": "check", "runs": online, "stores": [_store(store, device) for store in stores]}

    answers: list[dict[str, Any]] = []
    pool.run([Job("check", message)], lambda job, answer, seconds: answers.append(answer), stop)
    if not stop.error and "error" in answers[0]:
        raise EXIT_CODES.get(answers[0]["exit_code"], DadFastError)(answers[0]["error"])


def _remove_if_new(output: Path) -> None:
    """A folder in which nothing was begun goes again."""
    if not (output / "config.toml").exists():
        for path in [*(output / "logs").glob("worker-*.log"), output / ".lock"]:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            (output / "logs").rmdir()
            output.rmdir()


class _Told:
    """What is known of a sweep under way, told after each job."""

    def __init__(self, plan: Plan, runs: Sequence[Run], left: Sequence[Run], output: Path, stop: StopRequest) -> None:
        self.plan, self.runs, self.output, self.stop = plan, runs, output, stop
        self.taught = _Taught(runs)
        self.failed: dict[str, str] = {}
        self._left, self._begun, self._ended = {one.name: one for one in left}, time.monotonic(), 0

    def job_ended(self, job: Job, answer: dict[str, Any], seconds: float) -> None:
        one = self._left.get(job.name)
        self._ended += one is not None
        if "error" in answer and self.stop.error:
            print_line(f"{job.name}: {answer['error']}")
            return
        if "error" in answer:
            self.failed[job.name] = answer["error"]
            text = f"failed: {answer['error']}"
        else:
            record = one.record() if one is not None else None
            if record is not None and one is not None:
                self.taught.learn(one.cfg, record)
            text = f"{'filled ' if one is None else _scores(record)}({seconds:.0f} s{self._ahead()})"
        counted = f"[{len(self.runs) - len(self._left) + self._ended}/{len(self.runs)}] " if one is not None else ""
        print_line(f"{counted}{job.name}: {text}")
        self.write()

    def _ahead(self) -> str:
        left = len(self._left) - self._ended
        return f", about {format_seconds((time.monotonic() - self._begun) / self._ended * left)} left" if self._ended and left else ""

    def write(self) -> None:
        write(self.output, self.plan, self.runs, self.failed)


def _store_job(store: SharedStore) -> Job:
    return Job(store.folder, lambda device: {"do": "store", **_store(store, device)}, shared_parts(store.config))


def _store(store: SharedStore, device: str) -> dict[str, Any]:
    return {"config": _toml(_online(store.config), device), "launch": asdict(store.launch)}


def _run_job(one: Run, launch: SweepLaunch, taught: _Taught) -> Job:
    def message(device: str) -> dict[str, Any]:
        return {
            "do": "run", "cell": one.cell, "config": _toml(one.cfg, device), "folder": str(one.folder), "preset": launch.preset,
            "taught": taught.of(one.cfg),
        }  # fmt: skip

    return Job(one.name, message, shared_parts(one.cfg), after=one.cfg.store.dirs)


def _toml(cfg: Config, device: str) -> str:
    return to_toml(with_values(cfg, {"device": device}))


def _online(cfg: Config) -> Config:
    """`cfg` without its stores, which are not there yet."""
    return with_values(cfg, {"store.dirs": (), "store.mix_outputs": False, "loss.form": "paper"})


class _Taught:
    """The accuracy of teachers, so that each is judged once in a sweep."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        for one in runs:
            if record := one.record():
                self.learn(one.cfg, record)

    def learn(self, cfg: Config, record: dict[str, Any]) -> None:
        if record.get("teacher"):
            self.of(cfg)[record["teacher"]["name"]] = record["teacher"]["suites"]

    def of(self, cfg: Config) -> dict[str, Any]:
        student = replace(cfg.student, weights="", init_from="")
        return self._known.setdefault(repr((cfg.teacher, cfg.data, cfg.augment, student, cfg.precision, cfg.engine, cfg.eval)), {})


def write(output: Path, plan: Plan, runs: Sequence[Run], failed: dict[str, str]) -> None:
    """results.json, table.md and plot.svg of what is there so far."""
    records = [record | {"variant": one.cell} for one in runs if (record := one.record()) is not None]
    if not records:
        return
    first = next(one for one in runs if one.record() is not None)
    facts = json.loads((first.folder / "run.json").read_text())
    kinds = list(dict.fromkeys(store.kind for store in plan.stores))
    whole: dict[str, Any] = {
        "config": to_toml(plan.config),
        "environment": {name: facts[name] for name in ENVIRONMENT if name in facts},
        "runs": records,
        "ablation": {"base": plan.base, "axes": plan.axes, "stores": kinds, "failed": failed},
    }
    whole["ablation"]["cells"] = summary(whole, plan.base)
    atomic_write_json(output / "results.json", whole)
    atomic_write_text(output / "table.md", ablation_markdown(whole))
    atomic_write_text(output / "plot.svg", forest_plot(whole))


def _scores(record: dict[str, Any] | None) -> str:
    return "".join(f"{name} {float(suite['top1']):.1f} %  " for name, suite in (record or {"suites": {}})["suites"].items())


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
                    raise UsageError(f"--output {output}: another dad-fast ablate works in it; wait for it, or stop it") from None
                time.sleep(0.2)
            except OSError as error:
                raise DataError(f"{output}: this file system has no locks ({error.strerror}); name a folder on another") from None
        yield handle
    finally:
        os.close(handle)
