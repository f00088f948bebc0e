"""One run from settings to report: check, train or resume, evaluate, write the folder."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dad_fast.config import Config, Launch, to_toml
from dad_fast.data.sources.base import Source
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.build import Builder, Components
from dad_fast.engine.finish import finish
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import UsageError
from dad_fast.evaluate.runner import Suite, open_suites
from dad_fast.evaluate.tables import print_table, read_record
from dad_fast.files import atomic_write_json, atomic_write_text
from dad_fast.kernels.csrc import csrc_status
from dad_fast.loggers.environment import environment
from dad_fast.loggers.run_log import print_line
from dad_fast.methods.stores import SharedStore, is_filled, online, seconds_file, store_seconds
from dad_fast.models.ensemble import Ensemble
from dad_fast.models.registry import teacher_settings
from dad_fast.report.page import write_report
from dad_fast.sweep.runs import Run, Sweep, check_output, clear
from dad_fast.sweep.tables import write_tables


def run_here(sweep: Sweep, launch: Launch) -> int:
    """Do the runs one after the other in this process and return the exit code.

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
    for number, run in enumerate(sweep.runs, start=1):
        label = f"[{number}/{len(sweep.runs)}] {run.name}" if several else run.variant
        teacher_results = by_teacher.setdefault(repr(teacher_settings(run.cfg)), {})
        train_run(run, label, launch, builder, teacher_results)
    if main and several:
        write_tables(sweep, {}, distributed.world())
        write_report(output)
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


def train_run(
    run: Run, label: str, launch: Launch, builder: Builder, teacher_results: dict[str, Any]
) -> dict[str, Any]:
    """Train or resume a run, evaluate it and return its record.

    teacher_results: records of teachers by `--teacher`, filled here, so that each is evaluated
    once.
    """
    with distributed.main_locks(run.folder):
        return _train_locked(run, label, launch, builder, teacher_results)


def _train_locked(
    run: Run, label: str, launch: Launch, builder: Builder, teacher_results: dict[str, Any]
) -> dict[str, Any]:
    cfg, folder = run.cfg, run.folder
    parts = builder.build(cfg)
    suites = open_suites(cfg.eval.suites, cfg.data, parts.train.classes, cfg.eval)
    trainer = Trainer(cfg, parts, folder, label, launch.resume, launch.allow_config_change)
    if launch.resume and trainer.next_step >= trainer.total_steps:
        record: dict[str, Any] | None = distributed.on_main(
            lambda: _finished(folder / "results.json", suites)
        )
        if record:
            if distributed.is_main():
                print_line(f"{label}: finished already ({folder})")
            return record
    if distributed.is_main():
        atomic_write_text(folder / "config.toml", to_toml(trainer.cfg))
        kernels = {"csrc": csrc_status()}
        if parts.discretizer is not None and parts.discretizer.backend:
            kernels["codebook_search"] = parts.discretizer.backend
        resolved = {
            "kernels": kernels,
            "loader": trainer.loader.name,
            "processes": distributed.world(),
            "data": {"train": _about(parts.train), "val": _about(parts.val)},
            "choices": {name: choice.record() for name, choice in trainer.choices.items()},
        }
        names = {"variant": run.variant, "preset": launch.preset}
        started = {"commands": _commands(folder / "run.json", launch)}
        facts = {**resolved, **names, **started, **_weights(parts)}
        atomic_write_json(folder / "run.json", environment() | facts)
    trainer.start()
    try:
        summary = trainer.train()
        summary["store_seconds"] = sum(map(store_seconds, cfg.store.dirs))
        return finish(trainer, run.variant, suites, summary, teacher_results)
    finally:
        trainer.log.close_sinks()


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


def _commands(facts: Path, launch: Launch) -> list[str]:
    """Return the command lines that started and resumed the run, each once, in order."""
    earlier: list[str] = []
    if launch.resume:
        with suppress(OSError, ValueError, KeyError, TypeError):
            earlier = list(map(str, json.loads(facts.read_text())["commands"]))
    return list(dict.fromkeys(filter(None, (*earlier, launch.command))))


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


def _about(source: Source) -> dict[str, str]:
    return {"images": source.describe(), "fingerprint": source.fingerprint}


def _weights(parts: Components) -> dict[str, Any]:
    """Return the frozen models and stores of a run, for run.json."""
    frozen = {"teacher": parts.teacher, "discretizer": parts.discretizer}
    found: dict[str, Any] = {
        name: {"name": part.name, "sha256": part.weights_sha256, "seen": part.provenance}
        for name, part in frozen.items()
        if part is not None
    }
    if isinstance(parts.teacher, Ensemble):
        found["teacher"] |= {
            "average": parts.teacher.average,
            "members": [
                {
                    "name": member.name,
                    "weight": weight,
                    "sha256": member.weights_sha256,
                    "loaded_sha256": parts.hashes[f"teacher {number}"],
                    "seen": member.provenance,
                }
                for number, (weight, member) in enumerate(parts.teacher.weighted_members(), start=1)
            ],
        }
    stores = parts.stored.stores
    if stores:
        found["stores"] = [
            {"folder": str(s.folder), "kind": s.kind, "views": s.num_views, "sha256": s.checksum}
            for s in stores
        ]
        found["teacher_loaded"] = parts.teacher is not None
    return found
