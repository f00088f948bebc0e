"""Measure the parts of a sweep on this machine by a few steps of each form, for cost.py."""

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
from dad_fast.data.loaders.choose import train_loader
from dad_fast.data.loaders.loader import Batch
from dad_fast.engine.build import Builder, Components
from dad_fast.engine.prefetch import feed
from dad_fast.engine.trainer import Trainer
from dad_fast.evaluation.runner import Suite, open_suites
from dad_fast.evaluation.suites.base import as_eval_set
from dad_fast.loggers.progress import report_progress
from dad_fast.methods.stores import SharedStore, online
from dad_fast.precompute.fill import estimate
from dad_fast.precompute.run import make_builder

# Steps that are timed, after the warm-up.
TIMED = 5


def measure(
    runs: Mapping[str, Config],
    stored: Mapping[str, Sequence[str]],
    stores: Sequence[SharedStore],
    builder_of: Callable[[Config], Builder],
) -> dict[str, Any]:
    """Return "runs" (seconds by name, with evaluation), "shared", "stores", "teacher" and "threads".

    stored: the kinds of store that a run will learn from. They do not exist yet and are imitated.
    "shared": the seconds by name in which a run makes its batches, once for all that share them.
    "stores": "seconds" and "bytes" by folder. "teacher": seconds to evaluate one.
    Evaluation is timed with the first run's student.
    """
    found: dict[str, Any] = {
        "runs": {},
        "shared": {},
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
        step, generation = _step_seconds(trainer, parts, stored.get(name, ()))
        training = trainer.total_steps * step
        found["shared"][name] = trainer.total_steps * generation
        evaluating = validations * evaluation["val"] + evaluation["suites"]
        found["runs"][name] = _preparing(trainer, parts) + training + evaluating
    found["teacher"] = evaluation["teacher"]
    for store in stores:
        filler = make_builder(store.config, store.launch)
        manifest = filler.manifest
        geometry = manifest.geometry
        blocks = sum(len(geometry.blocks(shard)) for shard in range(geometry.num_shards))
        size = sum(manifest.bytes_per_sample.values()) * manifest.num_samples * manifest.num_views
        found["stores"][store.folder] = {"seconds": estimate(filler, TIMED) * blocks, "bytes": size}
    return found


def _step_seconds(
    trainer: Trainer, parts: Components, stored: Sequence[str]
) -> tuple[float, float]:
    """Return the seconds of the median step, including the wait for the loader, and those in which
    it loads and makes the batch.
    """
    warm = 4 if parts.device.type == "cuda" else 1
    loader = trainer.loader
    if parts.probe is not None:
        # A loader that augments, also if the run would keep the features of its views.
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
    steps, generations = [], []
    for number in range(warm + TIMED):
        start = _now(parts.device)
        batch = next(batches)
        loaded = _now(parts.device)
        trainer.step(batch, number, trainer.cfg.schedule.min_lr)
        steps.append(_now(parts.device) - start)
        generating = _now(parts.device)
        for part in batch.split(trainer.cfg.engine.grad_accum_steps):
            trainer.step.generate(part)
        generations.append(_now(parts.device) - generating + loaded - start)
    return median(steps[warm:]), median(generations[warm:])


def _preparing(trainer: Trainer, parts: Components) -> float:
    """Return the seconds that a linear probe takes to encode its views before the first step."""
    probe, cfg = parts.probe, trainer.cfg
    if probe is None or probe.features is None:
        return 0.0
    encoded = _seconds(trainer, parts.student, Suite("train", parts.train), cfg)
    return encoded * max(1, cfg.lp_clip.views)


def _as_if_stored(
    batches: Iterator[Batch], parts: Components, stored: Sequence[str]
) -> Iterator[Batch]:
    """Yield `batches` with empty records in place of a store's, which take a step as long."""
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
            num_codes = math.prod(parts.discretizer.code_grid(parts.student.image_size))
            bits = num_codes * parts.discretizer.code_bits
            found["dad_codes"] = torch.zeros(size, -(-bits // 8), dtype=torch.uint8)
        if parts.probe is not None:
            found |= {"pseudo_labels": batch.labels.clamp(min=0), "confidence": torch.ones(size)}
            if parts.probe.features is not None:
                found["features"] = torch.zeros(size, parts.probe.features.shape[-1])
        if "targets" in stored:
            found["clean_outputs"] = torch.zeros(size, classes, dtype=torch.float16)
        yield replace(batch, **found)


def _evaluation(trainer: Trainer, cfg: Config, parts: Components) -> dict[str, float]:
    """Return the seconds to evaluate on the val split and all suites, from a batch of each."""
    suites = open_suites(cfg.eval.suites, cfg.data, parts.train.classes, cfg.eval) or [
        Suite(cfg.data.val_split, parts.val)
    ]
    # Warm up.
    trainer.evaluate(parts.student, _first_batch(suites[0], cfg)[0])
    teacher = 0.0
    if parts.teacher is not None and parts.teacher.has_head:
        teacher = sum(_seconds(trainer, parts.teacher, suite, cfg) for suite in suites)
    return {
        "val": _seconds(trainer, parts.student, Suite(cfg.data.val_split, parts.val), cfg),
        "suites": sum(_seconds(trainer, parts.student, suite, cfg) for suite in suites),
        "teacher": teacher,
    }


def _seconds(trainer: Trainer, model: torch.nn.Module, suite: Suite, cfg: Config) -> float:
    few, share = _first_batch(suite, cfg)
    start = _now(trainer.parts.device)
    trainer.evaluate(model, few)
    return (_now(trainer.parts.device) - start) / share


def _first_batch(suite: Suite, cfg: Config) -> tuple[Suite, float]:
    """Return the suite cut to a batch, and the batch's share of the suite."""
    eval_set = as_eval_set(suite.source)
    piece = eval_set.pieces[0]
    few = np.flatnonzero(piece.ok)[: cfg.eval.batch_size or cfg.data.batch_size]
    cut = replace(eval_set, pieces=(piece.taken(few),), parts=eval_set.parts[:1])
    num_images = sum(int(piece.ok.sum()) for piece in eval_set.pieces)
    return replace(suite, source=cut), len(few) / num_images


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
