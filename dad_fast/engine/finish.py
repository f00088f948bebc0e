"""The end of a run: judge the student on every suite, and write what the run's folder is kept for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dad_fast.data.augment.mixing import soft_targets, to_pixels
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.discretizers.base import Discretized, Discretizer
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.generator import AttackGenerator
from dad_fast.engine.trainer import Trainer
from dad_fast.evaluate.runner import Result, Suite
from dad_fast.files import atomic_write_json
from dad_fast.loggers.progress import report_progress
from dad_fast.methods.discretize import discretize
from dad_fast.methods.losses import keep_mask
from dad_fast.methods.registry import METHODS, Images
from dad_fast.report.page import write_report
from dad_fast.report.pieces import write_pieces
from dad_fast.report.sheet import difference_scale, write_sheet

SHEET_ROWS = 8


def finish(
    trainer: Trainer,
    variant: str,
    suites: Sequence[Suite],
    summary: dict[str, float],
    teacher_results: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write model.safetensors, sheet.png and .safetensors, results.json and report.html; returns the record that results.json holds.

    suites: what the student is judged on; the validation split alone where there are none.
    teacher_results: results of teachers by name, filled here: a teacher that several runs share is judged once.
    """
    cfg, parts, output = trainer.cfg, trainer.parts, trainer.output
    suites = suites or [Suite(cfg.data.val_split, parts.val)]
    main = (
        distributed.is_main()
    )  # all processes judge, each its share of the images; this one writes
    if main:
        trainer.write_model(output / "model.safetensors")
    student = {
        suite.name: trainer.judge(trainer.evaluated, suite, _progress(suite.name))
        for suite in suites
    }
    teacher = None
    if parts.teacher is not None:
        if parts.teacher.name not in teacher_results:
            teacher_results[parts.teacher.name] = {
                suite.name: trainer.judge(
                    parts.teacher, suite, _progress(f"teacher on {suite.name}")
                ).to_dict()
                for suite in suites
            }
        teacher = {
            "name": parts.teacher.name,
            "seen": parts.teacher.provenance,
            "suites": teacher_results[parts.teacher.name],
        }
    if (
        main
        and parts.discretizer is not None
        and (parts.teacher is not None or METHODS[cfg.method].uses(Images.ATTACK_STUDENT))
    ):
        _sheet(trainer, output)
    record = {
        "variant": variant,
        "method": cfg.method,
        "seed": cfg.seed,
        **summary,
        "student": parts.student.name,
        "num_parameters": sum(p.numel() for p in trainer.evaluated.parameters()),
        "bn": cfg.student.bn if parts.student.has_batch_stats else None,
        "suites": {name: result.to_dict() for name, result in student.items()},
        "teacher": teacher,
        "discretizer": None
        if parts.discretizer is None
        else {"name": parts.discretizer.name, "seen": parts.discretizer.provenance},
    }
    if main:
        atomic_write_json(output / "results.json", record)
        write_report(output)
    trainer.log.say(f"{trainer.label}: {_line(student)}")
    return record


def _progress(name: str) -> Callable[[int, int], None]:
    return lambda done, total: report_progress(done, total, f"evaluating {name}")


def _line(results: dict[str, Result]) -> str:
    return "  ".join(f"{name} {result.top1:.1f} %" for name, result in results.items())


def _sheet(trainer: Trainer, output: Path) -> None:
    """x, Q(x) and Q(x + delta) of a few validation images: against the teacher, or the student where that is what is attacked."""
    cfg, parts = trainer.cfg, trainer.parts
    generator = trainer.step.generator
    assert parts.discretizer is not None and isinstance(generator, AttackGenerator)
    attacked = parts.teacher or trainer.evaluated
    student = parts.student
    loader = EvalLoader(
        parts.val,
        student.image_size,
        student.crop_pct,
        student.interpolation,
        SHEET_ROWS,
        workers=0,
    )
    batch = next(iter(loader))
    x, labels = to_pixels(batch.images.to(parts.device)), batch.labels.to(parts.device)
    attacked.eval()
    target = soft_targets(labels, student.num_classes)
    found = discretize(
        parts.discretizer,
        attacked,
        generator.attack,
        x,
        target,
        batch.samples.to(parts.device),
        cfg.attack.order,
    )
    with torch.no_grad():
        plain = parts.discretizer(x)
        said = attacked(found.images)
    names = parts.train.classes.names
    answers = [names[answer] for answer in said.argmax(1).tolist()]
    kept = [bool(one) for one in keep_mask(said, labels).tolist()]
    examples = [
        {"label": names[label], "answer": answer, "kept": one, "filtered": cfg.loss.filter}
        for label, answer, one in zip(labels.tolist(), answers, kept, strict=True)
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
    """How far each code moved in the codebook, [N, h, w], and the codebook's size; (None, 0) without codes."""
    if before.codes is None or after.codes is None or discretizer.codebook is None:
        return None, 0
    codebook = discretizer.codebook.float()  # [K, D]
    distance = (codebook[before.codes] - codebook[after.codes]).norm(dim=-1)
    tiny = torch.finfo(
        torch.float32
    ).tiny  # two codes may be equal vectors: another code all the same
    return distance.clamp_min(tiny).where(before.codes != after.codes, 0.0), len(codebook)


def _captions(examples: Sequence[dict[str, Any]], shift: torch.Tensor | None) -> list[str]:
    captions = []
    for i, example in enumerate(examples):
        verdict = (
            ["kept"]
            if example["kept"]
            else ["dropped" if example["filtered"] else "seen", f"as {example['answer']}"]
        )
        share = [] if shift is None else [f"{(shift[i] > 0).float().mean().item():.0%} codes"]
        captions.append("\n".join([example["label"], *verdict, *share]))
    return captions
