"""Runs from settings to report: check, train or resume, evaluate, write the folders."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dad_fast.checkpoint.common import resume_steps
from dad_fast.config import Config, Launch, to_toml
from dad_fast.data.augment.view import View
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.build import Builder, Components
from dad_fast.engine.finish import finish
from dad_fast.engine.lockstep import Lockstep
from dad_fast.engine.trainer import Trainer, checkpoints_of
from dad_fast.errors import NotFinite, UsageError
from dad_fast.evaluation.runner import Suite, open_suites
from dad_fast.evaluation.tables import print_table, read_record
from dad_fast.files import atomic_write_json, atomic_write_text
from dad_fast.loggers.run_log import print_line
from dad_fast.methods.stores import SharedStore, is_filled, online, seconds_file, store_seconds
from dad_fast.models.registry import teacher_settings
from dad_fast.report.page import write_report
from dad_fast.sweep.facts import write_facts
from dad_fast.sweep.groups import groups
from dad_fast.sweep.runs import Run, Sweep, check_output, clear
from dad_fast.sweep.tables import show_tables, write_tables


def run_here(sweep: Sweep, launch: Launch) -> int:
    """Do the runs in this process, group by group, and return the exit code.

    With several ranks, all of them call this; the first one writes.
    """
    with distributed.main_locks(sweep.output):
        return _run_locked(sweep, launch)


def _run_locked(sweep: Sweep, launch: Launch) -> int:
    output = sweep.output
    main, several = distributed.is_main(), len(sweep.runs) > 1
    distributed.on_main(lambda: check_output(sweep, launch))
    if sweep.stores and distributed.world() > 1:
        make = "make them first with dad-fast precompute and give them with --store"
        raise UsageError(
            f"--stores: {distributed.world()} processes cannot fill stores here; {make}"
        )
    builder = Builder()
    # One run per variant is enough, unless their checkpoints are compared with the settings.
    checked = {run.variant if not launch.resume else run.folder: run for run in sweep.runs}
    unfilled = sweep.unfilled(launch.overwrite)
    for run in checked.values():
        check_run(run.cfg, run.folder, launch, builder, not unfilled.isdisjoint(run.cfg.store.dirs))
    if main:
        if launch.overwrite:
            clear(output)
        output.mkdir(parents=True, exist_ok=True)
        if several:
            atomic_write_text(output / "config.toml", to_toml(sweep.config))
    distributed.barrier()
    for store in sweep.stores:
        fill_store(store)
    by_teacher: dict[str, dict[str, dict[str, Any]]] = {}
    number = 0
    for group in groups(sweep, sweep.runs, launch.share_batches):
        labels = []
        for run in group:
            number += 1
            labels.append(f"[{number}/{len(sweep.runs)}] {run.name}" if several else run.variant)
        teacher_results = by_teacher.setdefault(repr(teacher_settings(group[0].cfg)), {})
        train_runs(group, labels, launch, builder, teacher_results)
    if main and several:
        write_tables(sweep, {}, distributed.world())
        show_tables(sweep)
    elif main:
        print_table(read_record(output / "results.json"))
        # Only methods that attack images write it.
        sheet = ", sheet.png" if (output / "sheet.png").exists() else ""
        print_line(
            f"{output}: model.safetensors, results.json, report.html{sheet} and logs; "
            f"run `dad-fast eval {output}` to evaluate on more test sets"
        )
    distributed.barrier()
    return 0


def check_run(cfg: Config, folder: Path, launch: Launch, builder: Builder, unfilled: bool) -> None:
    """Raise errors in a run's settings before a file is written or removed.

    unfilled: its stores are not filled yet; the run is then checked as if it had none, and its
    checkpoints, if any, are compared when it begins.
    """
    _check_batch_sizes(cfg, launch)
    if unfilled:
        cfg, launch = online(cfg), replace(launch, resume="")
    parts = builder.build(cfg)
    open_suites(cfg.eval.suites, cfg.data, parts.train.classes, cfg.eval)
    # Looking for checkpoints finishes renames of a killed run.
    with distributed.main_locks(folder) if launch.resume else nullcontext():
        Trainer(cfg, parts, folder, "", launch.resume, launch.allow_config_change)


@dataclass
class _Member:
    """A run, what it is built from, and the suites to evaluate it on."""

    run: Run
    label: str
    parts: Components
    suites: list[Suite]
    resume: str
    trainer: Trainer | None = None

    def make_trainer(self, launch: Launch) -> Trainer:
        run, allow = self.run, launch.allow_config_change
        trainer = Trainer(run.cfg, self.parts, run.folder, self.label, self.resume, allow)
        self.trainer = trainer
        return trainer

    def finished(self) -> dict[str, Any] | None:
        """Return the record of a run that is trained and evaluated already."""
        trainer = self.trainer
        if trainer is None or trainer.next_step < trainer.total_steps:
            return None
        path = self.run.folder / "results.json"
        record: dict[str, Any] | None = distributed.on_main(lambda: _finished(path, self.suites))
        if record and distributed.is_main():
            print_line(f"{self.label}: finished already ({self.run.folder})")
        return record


def train_runs(
    runs: Sequence[Run],
    labels: Sequence[str],
    launch: Launch,
    builder: Builder,
    teacher_results: dict[str, Any],
) -> list[dict[str, Any]]:
    """Train or resume runs that share their batches, evaluate them and return their records.

    The settings of the runs are equal in all that batches and their generation depend on. Finished
    runs are not trained again; runs that cannot resume from one step are trained apart.
    teacher_results: records of teachers by `--teacher`, with the first run's view of images, filled
    here, so that each is evaluated once.
    Raises NotFinite for a run whose loss is not finite, after the others are evaluated.
    """
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(distributed.main_locks(run.folder))
        members = [_member(*one, launch, builder) for one in zip(runs, labels, strict=True)]
        # The teacher is evaluated on what the student sees.
        by_view = {members[0].parts.student.view: teacher_results}
        records: dict[Path, dict[str, Any]] = {}
        left = []
        for member in members:
            if launch.resume and (len(runs) == 1 or _has_results(member.run)):
                member.make_trainer(launch)
                if record := member.finished():
                    records[member.run.folder] = record
                    continue
                if len(runs) > 1:
                    # Its student has the weights of a checkpoint, which may not be the common one.
                    member = _member(member.run, member.label, launch, builder)
            left.append(member)

        failed: list[NotFinite] = []
        for group in _groups(left):
            results, problems = _train_group(group, launch, by_view)
            records |= results
            failed += problems
        if failed:
            raise failed[0]
        return [records[run.folder] for run in runs]


def _member(run: Run, label: str, launch: Launch, builder: Builder) -> _Member:
    parts = builder.build(run.cfg)
    suites = open_suites(run.cfg.eval.suites, run.cfg.data, parts.train.classes, run.cfg.eval)
    return _Member(run, label, parts, suites, launch.resume)


def _has_results(run: Run) -> bool:
    return bool(distributed.on_main((run.folder / "results.json").exists))


def _groups(members: Sequence[_Member]) -> list[list[_Member]]:
    """Divide runs by the step from which they begin or resume."""
    if len(members) < 2 or not members[0].resume:
        return [list(members)] if members else []

    def find() -> Any:
        folders = [checkpoints_of(one.run.folder, one.run.cfg) for one in members]
        # Trainers log damaged checkpoints of runs that have no other.
        return resume_steps(folders, print_line)

    steps: list[int | None] = distributed.on_main(find)
    groups: dict[int | None, list[_Member]] = {}
    for member, step in zip(members, steps, strict=True):
        if step is not None:
            member.resume = str(checkpoints_of(member.run.folder, member.run.cfg).path_of(step))
        groups.setdefault(step, []).append(member)
    if len(groups) > 1 and distributed.is_main():
        stands = ", ".join(
            f"{one.label} at step {step or 0:,}" for one, step in zip(members, steps, strict=True)
        )
        print_line(f"runs at different steps are trained apart: {stands}")
    return list(groups.values())


def _train_group(
    members: Sequence[_Member],
    launch: Launch,
    by_view: dict[View, dict[str, Any]],
) -> tuple[dict[Path, dict[str, Any]], list[NotFinite]]:
    """Train and evaluate runs at one step.

    by_view: teacher results by view of images. Returns the records by folder, and errors of runs
    that could not be finished.
    """
    trainers = [one.trainer or one.make_trainer(launch) for one in members]
    lockstep = Lockstep(trainers)
    if distributed.is_main():
        for member, trainer in zip(members, trainers, strict=True):
            atomic_write_text(trainer.output / "config.toml", to_toml(trainer.cfg))
            write_facts(trainer, member.run.variant, launch, lockstep.sharing_with(trainer))
    records = {}
    try:
        lockstep.start()
        with suppress(NotFinite):
            lockstep.train()
        for member, trainer in zip(members, trainers, strict=True):
            if trainer in lockstep.failed:
                continue
            summary = trainer.summary()
            summary["store_seconds"] = sum(map(store_seconds, trainer.cfg.store.dirs))
            known = by_view.setdefault(member.parts.student.view, {})
            with trainer.own_random():
                records[member.run.folder] = finish(
                    trainer, member.run.variant, member.suites, summary, known
                )
    finally:
        lockstep.close_sinks()
    return records, list(lockstep.failed.values())


def fill_store(store: SharedStore) -> None:
    """Fill a store or resume filling it, and add the seconds to the file next to it."""
    from dad_fast.precompute import run as precompute

    if is_filled(store.folder):
        return
    before, start = store_seconds(store.folder), time.monotonic()
    try:
        precompute.run(store.config, store.launch, [])
    finally:
        if Path(store.folder).is_dir():
            seconds = round(before + time.monotonic() - start, 2)
            atomic_write_json(seconds_file(store.folder), {"seconds": seconds})


def _check_batch_sizes(cfg: Config, launch: Launch) -> None:
    """Raise UsageError if two batch sizes on one command line disagree."""
    sizes, parts = cfg.data, cfg.engine.grad_accum_steps
    product = sizes.batch_size * distributed.world() * parts
    if launch.both_batch_sizes and sizes.global_batch_size != product:
        factors = f"{distributed.world()} processes x --grad-accum-steps {parts}"
        raise UsageError(
            f"--global-batch-size {sizes.global_batch_size}: "
            f"--batch-size {sizes.batch_size} x {factors} = {product}; leave one of the sizes out"
        )


def _finished(path: Path, suites: list[Suite]) -> dict[str, Any] | None:
    """Return the record if it is complete and covers these suites; None = evaluate again."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if suites and set(record["suites"]) != {suite.name for suite in suites}:
            return None
        # A run may be killed between writing its results and its report.
        if not (path.parent / "report.html").exists():
            write_report(path.parent)
        return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
