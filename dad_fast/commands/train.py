"""`dad-fast train`: one run, or every variant and seed of a comparison, judged and written to the output folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dad_fast.config import Config, Launch, expand, to_toml
from dad_fast.engine import distributed
from dad_fast.engine.build import Builder, Parts
from dad_fast.engine.finish import finish
from dad_fast.engine.launch import end_with_launcher, is_worker, number_of_processes, run_processes, started_here
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import UsageError
from dad_fast.evaluate.runner import Suite, open_suites
from dad_fast.evaluate.table import print_table, read_record, write_comparison
from dad_fast.files import atomic_write_json, atomic_write_text
from dad_fast.kernels.csrc import csrc_status
from dad_fast.models.discretizer import VQGANDiscretizer
from dad_fast.observe.report import write_report
from dad_fast.observe.runlog import environment, print_line

OF_A_RUN = (
    "config.toml", "run.json", "metrics.jsonl", "train.log", "train.log.1", "train-rank*.log*", "checkpoints", "model.safetensors",
    "results.json", "sheet.png", "sheet.safetensors", "table.md", "report.html",
)  # fmt: skip


def run(cfg: Config, launch: Launch) -> int:
    """Returns the exit code. Layout: OUT itself for one run; OUT/<variant>/seed-<s>/ and a table in OUT for several."""
    if is_worker():
        if launch.nproc != "1" and not started_here():
            raise UsageError("--nproc: torchrun starts the processes; leave it out")
        end_with_launcher()
    elif (nproc := number_of_processes(launch.nproc)) > 1:
        return run_processes(nproc, "train", launch.arguments)
    with distributed.joined(cfg):
        return _run(cfg, launch)


def _run(cfg: Config, launch: Launch) -> int:
    """All processes go through this together; what reads or writes the output folder is the first one's."""
    output, runs, main = Path(launch.output), expand(cfg), distributed.is_main()
    distributed.on_main(lambda: _check_output(output, launch, len(runs)))
    if launch.resume not in ("", "auto") and len(runs) > 1:
        raise UsageError("--resume PATH continues one run; use --resume auto for a comparison of several")
    folders = [output / name / f"seed-{seed}" if len(runs) > 1 else output for name, seed, _ in runs]
    builder = Builder()
    # Whatever a user got wrong, in any variant, shows here, before a file is written or removed; on resuming, in any run.
    checked = {name if not launch.resume else folder: (one, folder) for (name, _, one), folder in zip(runs, folders, strict=True)}
    for one, folder in checked.values():
        _check_batch_sizes(one, launch)
        parts = builder.build(one)
        suites = open_suites(one.eval.suites, one.data, parts.train.classes, one.eval)
        Trainer(one, parts, folder, "", launch.resume, launch.allow_config_change)
    if main:
        if launch.overwrite:
            _clear(output)
        output.mkdir(parents=True, exist_ok=True)
        if len(runs) > 1:
            atomic_write_text(output / "config.toml", to_toml(cfg))
    distributed.barrier()
    taught: dict[str, dict[str, Any]] = {}
    records = []
    for number, ((name, seed, one), folder) in enumerate(zip(runs, folders, strict=True), start=1):
        label = f"[{number}/{len(runs)}] {name} seed {seed}" if len(runs) > 1 else name
        records.append(one_run(name, one, folder, label, launch, builder, suites, taught))
    if main and len(runs) > 1:
        write_comparison(output, cfg, records)
        write_report(output)
        print_line(f"{output}: table.md, report.html, results.json, and a folder a run")
    elif main:
        print_table(read_record(output / "results.json"))
        print_line(f"{output}: model.safetensors, results.json, report.html, sheet.png, and logs; dad-fast eval {output} judges it further")
    distributed.barrier()
    return 0


def one_run(
    name: str, cfg: Config, folder: Path, label: str, launch: Launch, builder: Builder, suites: list[Suite], taught: dict[str, Any]
) -> dict[str, Any]:
    """One run, or what is left of it, or its record where nothing is left."""
    parts = builder.build(cfg)
    trainer = Trainer(cfg, parts, folder, label, launch.resume, launch.allow_config_change)
    if launch.resume and trainer.next_step >= trainer.total_steps:
        record: dict[str, Any] | None = distributed.on_main(lambda: _finished(folder / "results.json", suites))
        if record:
            if distributed.is_main():
                print_line(f"{label}: finished already ({folder})")
            return record
    if distributed.is_main():
        atomic_write_text(folder / "config.toml", to_toml(trainer.cfg))
        kernels = {"csrc": csrc_status()}
        if isinstance(parts.discretizer, VQGANDiscretizer):
            kernels["codebook_search"] = parts.discretizer.vqgan.search().backend
        resolved = {"kernels": kernels, "loader": trainer.loader.name, "processes": distributed.world()}
        facts = {**resolved, "variant": name, "preset": launch.preset, **_weights(parts)}
        atomic_write_json(folder / "run.json", environment() | facts)
    trainer.start()
    return finish(trainer, name, suites, trainer.train(), taught)


def _check_batch_sizes(cfg: Config, launch: Launch) -> None:
    """Two sizes on one command line must say the same."""
    sizes, parts = cfg.data, cfg.engine.grad_accum_steps
    product = sizes.batch_size * distributed.world() * parts
    if launch.both_batch_sizes and sizes.global_batch_size != product:
        made = f"--batch-size {sizes.batch_size} x {distributed.world()} processes x --grad-accum-steps {parts} = {product}"
        raise UsageError(f"--global-batch-size {sizes.global_batch_size}: {made}; leave one of the sizes out")


def _finished(path: Path, suites: list[Suite]) -> dict[str, Any] | None:
    """The record of a run that was judged on these suites; None where it is to be judged again."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if suites and set(record["suites"]) != {suite.name for suite in suites}:
            return None
        if not (path.parent / "report.html").exists():  # killed between the two
            write_report(path.parent)
        return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _weights(parts: Parts) -> dict[str, Any]:
    frozen = {"teacher": parts.teacher, "discretizer": parts.discretizer}
    found: dict[str, Any] = {
        name: {"name": part.name, "sha256": part.weights_sha256, "seen": part.provenance} for name, part in frozen.items()
        if part is not None
    }
    stores = parts.stored.stores
    if stores:
        found["stores"] = [{"folder": str(s.folder), "kind": s.kind, "views": s.num_views, "sha256": s.checksum} for s in stores]
        found["teacher_loaded"] = parts.teacher is not None
    return found


def _check_output(output: Path, launch: Launch, num_runs: int) -> None:
    """An existing folder is never touched unless the user said how."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder")
    occupied = output.is_dir() and any(output.iterdir())
    if launch.resume and num_runs > 1 and _is_run(output):
        raise UsageError(f"--resume: {output} holds one run, and these are {num_runs} in folders of their own; name another --output")
    if launch.resume and num_runs == 1 and _runs_inside(output):
        raise UsageError(f"--resume: {output} holds several runs, and this is one; name another --output, or give --seeds as before")
    if not occupied or launch.resume:
        return
    if not launch.overwrite:
        raise UsageError(f"--output {output} exists; go on with --resume auto, replace it with --overwrite, or name another folder")
    if not _is_run(output) and not _runs_inside(output):
        raise UsageError(f"--overwrite: {output} is not empty and holds no run; name another folder")


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").exists()


def _runs_inside(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/seed-*/run.json")]


def _clear(output: Path) -> None:
    """Remove what runs have written, and nothing else that may lie in the folder."""
    for inside in _runs_inside(output):
        _clear_one(inside)
        for empty in (inside, inside.parent):
            if not any(empty.iterdir()):
                empty.rmdir()
    if output.is_dir():
        _clear_one(output)


def _clear_one(folder: Path) -> None:
    for path in [path for pattern in OF_A_RUN for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
