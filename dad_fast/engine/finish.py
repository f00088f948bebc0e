"""End of a run: evaluate the student on every suite, and write model, results and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dad_fast.data.augment.mixing import soft_targets, to_pixels
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.subset import Subset
from dad_fast.discretizers.base import Discretized, Discretizer
from dad_fast.distributed import process_group as distributed
from dad_fast.engine import frozen
from dad_fast.engine.generator import AttackGenerator
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import DadFastError
from dad_fast.evaluation.runner import Suite
from dad_fast.evaluation.show import non_finite_note
from dad_fast.evaluation.tables import rows as table_rows
from dad_fast.files import atomic_write_json
from dad_fast.loggers.progress import count_progress
from dad_fast.methods.attack import discretize
from dad_fast.methods.losses import keep_mask
from dad_fast.methods.registry import METHODS, Images
from dad_fast.models.teacher import Teacher
from dad_fast.report.page import write_report
from dad_fast.report.pieces import write_pieces
from dad_fast.report.sheet import difference_scale, spread_over_classes, write_sheet

SHEET_ROWS = 8
# Metrics of a suite in metrics.jsonl; results.json has all.
LOGGED = ("top1", "top5", "nll", "ece", "mce")


def finish(
    trainer: Trainer,
    variant: str,
    suites: Sequence[Suite],
    summary: dict[str, float],
    teacher_results: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write model.safetensors, sheet.png, sheet.safetensors, results.json and report.html.

    suites: what to evaluate the student on; empty = the validation split.
    teacher_results: records of teachers by `--teacher`, filled here, so that runs that share a
    teacher evaluate it once.
    Returns the content of results.json. A collective: all processes evaluate their share of the
    images, the first one writes.
    """
    cfg, parts, output = trainer.cfg, trainer.parts, trainer.output
    suites = suites or [Suite(cfg.data.val_split, parts.val)]
    main = distributed.is_main()
    if main:
        trainer.write_model(output / "model.safetensors")
        trainer.log.say(_describe_weights(trainer))
    student = {
        suite.name: trainer.evaluate(trainer.evaluated, suite, _progress(trainer, suite.name))
        for suite in suites
    }
    for result in student.values():
        if note := non_finite_note(result):
            trainer.log.say(f"{trainer.label}: {note}")
    teacher = _teacher_record(trainer, suites, teacher_results)
    is_attacked = parts.teacher is not None or METHODS[cfg.method].uses(Images.ATTACK_STUDENT)
    if main and parts.discretizer is not None and is_attacked:
        _write_sheet(trainer, output)

    discretizer = None
    if parts.discretizer is not None:
        discretizer = {"name": parts.discretizer.name, "seen": parts.discretizer.provenance}
    record = {
        "variant": variant,
        "method": cfg.method,
        "seed": cfg.seed,
        **summary,
        "student": parts.student.name,
        "num_parameters": sum(p.numel() for p in trainer.evaluated.parameters()),
        "bn": cfg.student.bn if parts.student.has_batch_stats else None,
        "classes": parts.train.classes.names,
        "suites": {name: result.to_dict() for name, result in student.items()},
        "teacher": teacher,
        "discretizer": discretizer,
    }
    if main:
        atomic_write_json(output / "results.json", record)
        _show_to_sinks(trainer, record)
        write_report(output)
    scores = "  ".join(f"{name} {result.top1:.1f} %" for name, result in student.items())
    trainer.log.say(f"{trainer.label}: {scores}")
    return record


def _show_to_sinks(trainer: Trainer, record: dict[str, Any]) -> None:
    """Log the results of every suite; give the log sinks the table and the sheet."""
    log, step = trainer.log, trainer.next_step
    for suite, values in record["suites"].items():
        metrics = {name: values[name] for name in LOGGED if values.get(name) is not None}
        log.metrics(f"test/{suite}", step=step, **metrics)
    header, rows, _ = table_rows({"runs": [record]}, "top1")
    log.table("results", step, ["model", *header[1:]], rows)
    sheet = trainer.output / "sheet.png"
    if sheet.exists():
        log.picture("sheet", step, sheet)


def _teacher_record(
    trainer: Trainer, suites: Sequence[Suite], teacher_results: dict[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Evaluate the teacher unless `teacher_results` has it.

    Returns None for a run without a teacher, for one from stores whose teacher is not at hand, and
    for an encoder without a class head.
    """
    name, stores = trainer.cfg.teacher.name, trainer.parts.stored.stores
    own = trainer.parts.teacher
    if (own is None and not stores) or (own is not None and not own.has_head):
        return None
    if name not in teacher_results:
        teacher = own or _teacher_of_stores(trainer)
        if teacher is None:
            return None
        results = {}
        for suite in suites:
            progress = _progress(trainer, f"the teacher on {suite.name}")
            results[suite.name] = trainer.evaluate(teacher, suite, progress).to_dict()
        teacher_results[name] = {
            "name": teacher.name,
            "seen": teacher.provenance,
            "suites": results,
        }
    return teacher_results[name]


def _teacher_of_stores(trainer: Trainer) -> Teacher | None:
    """Load the teacher that filled the run's stores, for the evaluation.

    Returns None, and logs the reason, if it is not available.
    """
    cfg, parts = trainer.settled, trainer.parts
    recorded = parts.stored.stores[0].manifest.hashes.get("teacher")
    teacher, problem = None, ""
    if not cfg.teacher.name:
        problem = f"the store has its hash ({str(recorded)[:12]}…) only; add --teacher"
    else:
        try:
            found = frozen.teacher(cfg, parts.train.classes, parts.device)
        except (DadFastError, torch.OutOfMemoryError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            teacher = found.model
            if recorded and found.fingerprint != recorded:
                problem = f"--teacher {cfg.teacher.name} is not the one that filled the store"
    problems = list(filter(None, distributed.all_gather_json(problem)))
    if problems:
        trainer.log.say(f"{trainer.label}: no results of the teacher: {problems[0]}")
        return None
    return teacher


def _progress(trainer: Trainer, name: str) -> Callable[[int, int], None]:
    return count_progress(f"evaluating {name}", enabled=distributed.is_main(), say=trainer.log.say)


def _describe_weights(trainer: Trainer) -> str:
    """Describe which weights model.safetensors holds, and where the best ones are."""
    last, best = trainer.next_step, trainer.checkpoints.best_step()
    kind = "EMA weights" if trainer.update.ema is not None else "weights"
    line = f"{trainer.label}: model.safetensors has the {kind} of the last step, {last:,}"
    if best is None:
        return line
    top1 = f"{trainer.best_top1:.2f} % on {trainer.cfg.data.val_split}"
    if best == last:
        return f"{line}, the best on validation ({top1})"
    where = trainer.checkpoints.root.name
    return f"{line}; the best ({top1}, step {best:,}) are in {where}/best/model.safetensors"


def _write_sheet(trainer: Trainer, output: Path) -> None:
    """Write x, Q(x) and Q(x + delta) of a few validation images of different classes, attacking the
    teacher or, without one, the student.
    """
    cfg, parts = trainer.cfg, trainer.parts
    generator = trainer.step.generator
    assert parts.discretizer is not None and isinstance(generator, AttackGenerator)
    attacked = parts.teacher or trainer.evaluated
    student = parts.student
    readable = np.flatnonzero(parts.val.ok)
    rows = readable[spread_over_classes(parts.val.labels[readable], SHEET_ROWS)]
    loader = EvalLoader(
        Subset(parts.val, rows, parts.val.labels[rows]),
        student.view,
        SHEET_ROWS,
        workers=0,
    )
    batch = next(iter(loader))
    x = to_pixels(batch.images.to(parts.device))
    labels = batch.labels.to(parts.device)
    attacked.eval()
    target = soft_targets(labels, student.num_classes)
    found = discretize(
        parts.discretizer,
        attacked,
        generator.attack,
        x,
        target,
        torch.from_numpy(rows)[batch.samples].to(parts.device),
        cfg.attack.order,
    )
    with torch.no_grad():
        plain = parts.discretizer(x)
        logits = attacked(found.images)
    names = parts.train.classes.names
    predictions = logits.argmax(1).tolist()
    kept = keep_mask(logits, labels).tolist()
    examples = [
        {
            "label": names[label],
            "answer": names[prediction],
            "kept": bool(is_kept),
            "filtered": cfg.loss.filter,
        }
        for label, prediction, is_kept in zip(labels.tolist(), predictions, kept, strict=True)
    ]
    shift, num_codes = _shift(parts.discretizer, plain, found)
    write_sheet(output / "sheet.png", x, plain.images, found.images, _captions(examples, shift))
    write_pieces(
        output / "sheet.safetensors",
        x,
        plain.images,
        found.images,
        scale=difference_scale(found.images - plain.images),
        examples=examples,
        attacked=attacked.name,
        shift=shift,
        num_codes=num_codes,
    )


def _shift(
    discretizer: Discretizer, before: Discretized, after: Discretized
) -> tuple[torch.Tensor | None, int]:
    """Return the distance of each code to its new code, [N, h, w], and the codebook's size; (None,
    0) without codes.
    """
    if before.codes is None or after.codes is None or discretizer.codebook is None:
        return None, 0
    codebook = discretizer.codebook.float()  # [K, D]
    distance = (codebook[before.codes] - codebook[after.codes]).norm(dim=-1)
    # Two codes may be equal vectors: a changed code has a distance above 0 all the same.
    tiny = torch.finfo(torch.float32).tiny
    return distance.clamp_min(tiny).where(before.codes != after.codes, 0.0), len(codebook)


def _captions(examples: Sequence[dict[str, Any]], shift: torch.Tensor | None) -> list[str]:
    captions = []
    for i, example in enumerate(examples):
        lines = [example["label"]]
        if example["kept"]:
            lines.append("kept")
        else:
            lines += ["dropped" if example["filtered"] else "seen", f"as {example['answer']}"]
        if shift is not None:
            changed = (shift[i] > 0).float().mean().item()
            lines.append(f"{changed:.0%} codes")
        captions.append("\n".join(lines))
    return captions
