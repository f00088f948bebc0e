"""Seconds that the parts of a sweep take on this machine, from a few steps of each form: the input of cost.py."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dad_fast.config import Config
from dad_fast.data.loaders.loader import Batch, train_loader
from dad_fast.engine.build import Builder, Components
from dad_fast.engine.prefetch import feed
from dad_fast.engine.trainer import Trainer
from dad_fast.evaluate.runner import Suite, open_suites
from dad_fast.evaluate.suites.base import as_eval_set
from dad_fast.loggers.progress import report_progress
from dad_fast.methods.stores import SharedStore, online
from dad_fast.precompute.fill import estimate
from dad_fast.precompute.run import make_builder

TIMED = 5  # steps, after those that warm up


def measure(
    runs: Mapping[str, Config],
    stored: Mapping[str, Sequence[str]],
    stores: Sequence[SharedStore],
    builder_of: Callable[[Config], Builder],
) -> dict[str, Any]:
    """Return seconds: "runs" of each run with its evaluation, "stores" by folder ("seconds" and "bytes"), "teacher" of
    evaluating one; and the "threads".

    stored: the kinds of store that a run will learn from. They do not exist yet and are imitated.
    Evaluation is timed with the first run's student.
    """
    found: dict[str, Any] = {
        "runs": {},
        "stores": {},
        "teacher": 0.0,
        "threads": torch.get_num_threads(),
    }
    evaluation: dict[str, float] = {}
    for number, (name, cfg) in enumerate(runs.items()):
        report_progress(number, len(runs), f"timing {name or 'plain distillation'}")
        plain = online(cfg)
        parts = builder_of(plain).build(plain)
        trainer = Trainer(plain, parts, Path("nothing is written"), "")
        evaluation = evaluation or _evaluation(trainer, plain, parts)
        every = cfg.eval.every_epochs * trainer.steps_per_epoch
        validations = 1 + (trainer.total_steps // every if every else 0)
        training = trainer.total_steps * _step_seconds(trainer, parts, stored.get(name, ()))
        evaluating = validations * evaluation["val"] + evaluation["suites"]
        found["runs"][name] = _preparing(trainer, parts) + training + evaluating
    found["teacher"] = evaluation["teacher"]
    for store in stores:
        filler = make_builder(store.config, store.launch)
        manifest = filler.manifest
        blocks = sum(
            len(manifest.geometry.blocks(shard)) for shard in range(manifest.geometry.num_shards)
        )
        size = sum(manifest.bytes_per_sample.values()) * manifest.num_samples * manifest.num_views
        found["stores"][store.folder] = {"seconds": estimate(filler, TIMED) * blocks, "bytes": size}
    return found


def _step_seconds(trainer: Trainer, parts: Components, stored: Sequence[str]) -> float:
    """The median step, waiting for the loader included."""
    warm = 4 if parts.device.type == "cuda" else 1
    loader = trainer.loader
    if parts.probe is not None:  # one that makes views, also where a run would keep them
        cfg = trainer.cfg
        loader = train_loader(
            cfg.data.loader,
            parts.train,
            cfg.augment,
            parts.student.image_size,
            trainer.images_per_step,
            cfg.seed,
            cfg.data.workers,
            device=parts.device,
        )
    batches = feed(_as_if_stored(loader.batches(0, warm + TIMED), parts, stored), parts.device)
    seconds = []
    for number in range(warm + TIMED):
        start = _now(parts.device)
        trainer.step(next(batches), number, trainer.cfg.schedule.min_lr)
        seconds.append(_now(parts.device) - start)
    return median(seconds[warm:])


def _preparing(trainer: Trainer, parts: Components) -> float:
    """Seconds to encode what a linear probe is told of its images before the first step: the strong views that are kept."""
    probe, cfg = parts.probe, trainer.cfg
    if probe is None or probe.features is None:
        return 0.0
    encoded = _seconds(trainer, parts.student, Suite("train", parts.train), cfg)
    return encoded * max(1, cfg.lp_clip.views)


def _as_if_stored(
    batches: Iterator[Batch], parts: Components, stored: Sequence[str]
) -> Iterator[Batch]:
    """`batches` with empty records in place of what stores of these kinds would give: a step takes as long with them."""
    for batch in batches:
        size, classes = len(batch.labels), len(parts.train.classes)
        found: dict[str, Any] = {}
        if "adversarial" in stored or "codes" in stored:
            found |= {
                "dad_outputs": torch.zeros(size, classes, dtype=torch.float16),
                "dad_kept": torch.ones(size),
            }
        if "adversarial" in stored:
            found["dad_images"] = batch.images.clone()
        if "codes" in stored:
            assert parts.discretizer is not None
            bits = (
                math.prod(parts.discretizer.code_grid(parts.student.image_size))
                * parts.discretizer.code_bits
            )
            found["dad_codes"] = torch.zeros(size, -(-bits // 8), dtype=torch.uint8)
        if parts.probe is not None:
            found |= {"pseudo_labels": batch.labels, "confidence": torch.ones(size)}
            if parts.probe.features is not None:
                found["features"] = torch.zeros(size, parts.probe.features.shape[-1])
        if "targets" in stored:
            found["clean_outputs"] = torch.zeros(size, classes, dtype=torch.float16)
        yield replace(batch, **found)


def _evaluation(trainer: Trainer, cfg: Config, parts: Components) -> dict[str, float]:
    """Seconds to evaluate on the validation split and on all suites, from one batch of each."""
    suites = open_suites(cfg.eval.suites, cfg.data, parts.train.classes, cfg.eval) or [
        Suite(cfg.data.val_split, parts.val)
    ]
    trainer.evaluate(parts.student, _first_batch(suites[0], cfg)[0])  # warms up
    return {
        "val": _seconds(trainer, parts.student, Suite(cfg.data.val_split, parts.val), cfg),
        "suites": sum(_seconds(trainer, parts.student, suite, cfg) for suite in suites),
        "teacher": sum(_seconds(trainer, parts.teacher, suite, cfg) for suite in suites)
        if parts.teacher is not None
        else 0.0,
    }


def _seconds(trainer: Trainer, model: torch.nn.Module, suite: Suite, cfg: Config) -> float:
    few, share = _first_batch(suite, cfg)
    start = _now(trainer.parts.device)
    trainer.evaluate(model, few)
    return (_now(trainer.parts.device) - start) / share


def _first_batch(suite: Suite, cfg: Config) -> tuple[Suite, float]:
    """The suite cut to a batch, and which share of it that is."""
    judged = as_eval_set(suite.source)
    piece = judged.pieces[0]
    few = np.flatnonzero(piece.ok)[: cfg.eval.batch_size or cfg.data.batch_size]
    cut = replace(judged, pieces=(piece.taken(few),), parts=judged.parts[:1])
    return replace(suite, source=cut), len(few) / sum(
        int(piece.ok.sum()) for piece in judged.pieces
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
