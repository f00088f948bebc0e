"""`dad-fast precompute`: fill a store, estimate the cost, or check a store."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dad_fast.config import Config
from dad_fast.config.options import StoreLaunch
from dad_fast.config.schema import StudentConfig
from dad_fast.data.augment.view import View
from dad_fast.data.sources.unlabelled import open_training
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.device import resolve_device
from dad_fast.distributed.launch import (
    end_with_launcher,
    is_worker,
    number_of_processes,
    run_processes,
)
from dad_fast.distributed.signals import stop_requests
from dad_fast.engine import frozen
from dad_fast.engine.choices import settle
from dad_fast.engine.self_test import choose_kernels
from dad_fast.errors import DataError
from dad_fast.locks import lock_folder
from dad_fast.loggers.progress import format_seconds, report_progress
from dad_fast.loggers.run_log import print_line
from dad_fast.models.ensemble import Ensemble
from dad_fast.models.student import build_student
from dad_fast.precompute.fill import (
    AdversarialFiller,
    StoreBuilder,
    TargetFiller,
    estimate,
    fill,
    stopped,
)
from dad_fast.precompute.recheck import recheck
from dad_fast.store import Manifest, StoreRows, open_store

LINE_SECONDS = 10.0


def run(cfg: Config, launch: StoreLaunch, arguments: Sequence[str]) -> int:
    """Run the command and return its exit code.

    arguments: those of the command line, for the processes that --nproc starts.
    """
    nproc = number_of_processes(launch.nproc)
    # Processes that share the work lock one shard at a time.
    if launch.estimate or launch.check or is_worker():
        return _run(cfg, launch, nproc)
    with lock_folder(Path(launch.output)) as lock:
        if nproc > 1:
            # They inherit the lock: after a kill it is free when the last of them has ended.
            code = run_processes(nproc, "precompute", arguments, lock)
            return code or _report_state(launch)
        return _run(cfg, launch, nproc)


def _run(cfg: Config, launch: StoreLaunch, nproc: int) -> int:
    end_with_launcher()
    rank, world = distributed.rank(), distributed.world()
    filler = make_builder(cfg, launch)
    if launch.estimate:
        return _estimate(filler, max(world, nproc), Path(launch.output))
    if launch.check:
        return _check(filler, launch)
    folder = Path(launch.output)
    done = 0
    with stop_requests() as stop, _progress(filler, rank, world) as advance:
        for records in fill(filler, folder, rank, world):
            done += 1
            advance(records)
            if stop.error:
                raise stopped(stop.error, done, folder)
    return _report_state(launch) if rank == 0 and nproc == 1 else 0


def _report_state(launch: StoreLaunch) -> int:
    state = "this part is done, others are not yet"
    if Manifest.load(Path(launch.output)).complete:
        state = f"complete; look at it with dad-fast store info {launch.output}"
    print_line(f"{launch.output}: {state}")
    return 0


def make_builder(cfg: Config, launch: StoreLaunch) -> StoreBuilder:
    """Load data and models. All errors of settings are raised here, before a file is written."""
    device = resolve_device(cfg.device)
    cfg = settle(cfg, device)
    source = open_training(cfg.data)
    loaded = frozen.teacher(cfg, source.classes, device)
    teacher = loaded.model
    hashes = {**loaded.member_fingerprints, "teacher": loaded.fingerprint}
    settings: dict[str, Any] = {
        "seed": cfg.seed,
        "precision": asdict(cfg.precision),
        "savings": sorted(cfg.engine.savings),
        "device": device.type,
    }
    if isinstance(teacher, Ensemble):
        settings["ensemble"] = {
            "weights": [weight for weight, _ in teacher.weighted_members()],
            "average": teacher.average,
            "temperature": cfg.loss.temperature,
        }
    view = _view(cfg, len(source.classes), teacher.image_size)
    if launch.targets:
        return TargetFiller(cfg, launch, source, teacher, view.image_size, settings, hashes, device)
    discretizer, hashes["discretizer"] = frozen.discretizer(cfg, device)
    batch_size = cfg.data.batch_size
    choose_kernels(cfg.engine, device, (), discretizer, view.image_size, batch_size)
    return AdversarialFiller(
        cfg, launch, source, teacher, discretizer, view, settings, hashes, device
    )


def _view(cfg: Config, num_classes: int, teacher_size: int) -> View:
    """Return the student's evaluation transform.

    Without a student: the teacher's size and timm's usual crop.
    """
    aug = cfg.augment
    view = View(teacher_size, 0.875, "bicubic")
    if cfg.student.name:
        architecture = StudentConfig(name=cfg.student.name, model_kwargs=cfg.student.model_kwargs)
        student = build_student(architecture, num_classes, aug.img_size)
        view = student.view
    return view.with_settings(aug)


def _estimate(filler: StoreBuilder, world: int, folder: Path) -> int:
    manifest = filler.manifest
    geometry = manifest.geometry
    seconds = estimate(filler)
    blocks = sum(len(geometry.blocks(shard)) for shard in range(geometry.num_shards))
    images = manifest.num_samples * manifest.num_views
    print(
        f"{manifest.num_samples:,} images, {manifest.num_views} views, "
        f"blocks of {manifest.block_size}"
    )
    total = format_seconds(seconds * blocks / world)
    processes = f"{world} process{'es' if world > 1 else ''}"
    rate = manifest.block_size / seconds
    print(f"time    {total} on {processes} like this one ({rate:,.0f} img/s each)")
    for kind, size in manifest.bytes_per_sample.items():
        if size:
            most = "at most " if kind == "images" and manifest.images != "raw" else ""
            print(f"{kind:<7} {most}{size:,} bytes an image, {most}{_bytes(size * images)}")
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    whole = images * sum(manifest.bytes_per_sample.values())
    free = shutil.disk_usage(disk).free
    print(f"disk    {_bytes(whole)} in all, {_bytes(free)} free in {disk}")
    return 0


def _check(filler: StoreBuilder, launch: StoreLaunch) -> int:
    drift = recheck(filler, open_store(launch.output), launch.check)
    print(drift)
    if drift.equal < drift.checked and not drift.devices:
        raise DataError(
            f"{launch.output}: not what this machine computes; other versions or hardware round "
            "differently, but a large difference means damage (dad-fast store verify), "
            "or another teacher, discretizer or data"
        )
    return 0


@contextmanager
def _progress(filler: StoreBuilder, rank: int, world: int) -> Iterator[Any]:
    """Yield a callback for each block's records: a bar on a terminal, else a line now and then.

    The first process shows its own share.
    """
    manifest = filler.manifest
    shards = range(rank, manifest.geometry.num_shards, world)
    total = sum(len(manifest.geometry.blocks(shard)) for shard in shards)
    start = last = time.monotonic()
    done = images = kept = 0
    changed: list[float] = []
    terminal = sys.stderr.isatty()

    def advance(records: StoreRows) -> None:
        nonlocal done, images, kept, last
        done += 1
        images += len(records.keys)
        kept += int(records.kept.sum()) if records.kept is not None else 0
        if records.changed is not None:
            changed.append(float(np.nanmean(records.changed)))
        now = time.monotonic()
        due = terminal or now - last >= LINE_SECONDS or done == total
        rate = images / (now - start)
        left = format_seconds((total - done) * manifest.block_size / rate)
        text = f"block {done:,}/{total:,}  {rate * world:,.0f} img/s  {left} left"
        if records.kept is not None:
            text += f"  kept {kept / images:.0%}"
        if changed:
            text += f"  codes changed {np.mean(changed):.0%}"
        report_progress(done, total, text)
        if rank or not due:
            return
        last = now
        if terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if terminal and done and not rank:
            print(file=sys.stderr)


def _bytes(number: float) -> str:
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(np.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:,.3g} {units[power]}"
