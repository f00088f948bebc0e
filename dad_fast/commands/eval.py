"""`dad-fast eval`: judges a checkpoint, a teacher or both on splits, folders and corruptions; a table, and JSON when asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dad_fast.config import Config, from_toml
from dad_fast.config.fields import coerce, settings, with_values
from dad_fast.config.schema import TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources import EMBEDDED, is_split, open_source
from dad_fast.engine.build import resolve_device
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluate.corruptions import CORRUPTIONS
from dad_fast.evaluate.runner import Result, Suite, evaluate, open_suites
from dad_fast.files import atomic_write_json
from dad_fast.models.student import CLASSES, checkpoint_file, load_student
from dad_fast.models.teacher import load_teacher
from dad_fast.models.weights import sha256_file
from dad_fast.observe.runlog import environment

HEADER = f"{'suite':<28} {'images':>8} {'top-1 %':>8} {'top-5 %':>8} {'ECE %':>8} {'NLL':>8}"


def run(checkpoint: str, flags: Mapping[str, Any], json_path: str) -> int:
    """Returns the exit code. `flags` maps settings' paths to what was typed; what it leaves out comes from the run's config.toml."""
    _check_json(json_path)
    if not checkpoint and not flags.get("teacher.name"):
        before = " before --suite" if "eval.suites" in flags else ""  # which takes all names that follow it
        raise UsageError(f"nothing to judge: name a checkpoint (a run's folder or a .safetensors file){before}, or a --teacher")
    weights = checkpoint_file(checkpoint) if checkpoint else None
    cfg = _settings(weights, flags)
    device = resolve_device(cfg.device)
    record: dict[str, Any] = {"data_dir": cfg.data.data_dir, "checkpoint": None, "teacher": None}
    names = cfg.eval.suites or (cfg.data.val_split,)

    if weights:
        student, metadata = load_student(weights)
        classes = _recorded_classes(weights, metadata, flags.get("data.class_map", ""))
        suites = open_suites(names, cfg.data, classes)
        facts = {"method": metadata.get("dad_fast.method", ""), "ema": metadata.get("dad_fast.ema", "") == "true"}
        title = f"{weights}: {student.name}" + (f" by {facts['method']}" if facts["method"] else "") + (", EMA" if facts["ema"] else "")
        own = (student.image_size, student.crop_pct, student.interpolation)
        results = _judge(student.to(device), suites, cfg, own, title)
        record["checkpoint"] = {"path": str(weights), "sha256": sha256_file(weights), "student": student.name, **facts, "suites": results}
    else:
        classes = _data_classes(names, cfg)
        suites = open_suites(names, cfg.data, classes)

    if cfg.teacher.name:
        teacher = load_teacher(cfg.teacher, classes, cfg.precision, device)
        results = _judge(teacher, suites, cfg, (teacher.image_size, 1.0, "bicubic"), f"teacher {teacher.name}")
        print(f"It has seen: {teacher.provenance}")
        record["teacher"] = {"name": teacher.name, "sha256": teacher.weights_sha256, "seen": teacher.provenance, "suites": results}

    if json_path:
        atomic_write_json(json_path, {**record, "environment": environment()})
    return 0


def _check_json(path: str) -> None:
    """Before anything is computed: the place exists, and what is replaced is an earlier result and not, say, weights."""
    if not path:
        return
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--json {path}: name a file in a folder that exists")
    if Path(path).exists() and Path(path).suffix != ".json":
        raise UsageError(f"--json {path}: exists and does not end in .json, so it is not replaced; name another file")


def _settings(weights: Path | None, flags: Mapping[str, Any]) -> Config:
    cfg = Config()
    if weights:
        folder = weights.absolute().parent
        # Of a run's folder, or of a checkpoint's: RUN/checkpoints/step-N.
        for path in (folder / "config.toml", folder.parent.parent / "config.toml"):
            if path.is_file():
                cfg = from_toml(path.read_text(encoding="utf-8"), str(path))
                break
    values = {path: coerce(settings()[path], value, settings()[path].flag) for path, value in flags.items()}
    # The run's teacher is judged only when asked for; a size is the model's own, and --batch-size is the batch of this verb.
    cfg = with_values(cfg, {"teacher": TeacherConfig(), "device": "auto", "augment.img_size": 0})
    cfg = with_values(cfg, values | ({"eval.batch_size": 0} if "data.batch_size" in values else {}))
    if not cfg.data.data_dir:
        raise UsageError("no data: add --data-dir (an image folder or embedded:digits); no config.toml beside the checkpoint names it")
    return cfg


def _recorded_classes(weights: Path, metadata: Mapping[str, str], class_map: str) -> ClassMap:
    """The classes of the checkpoint's head, in its order; `--class-map` may only say the same."""
    if CLASSES not in metadata:
        raise DataError(f"{weights}: no class list in its metadata, so its outputs have no meaning; was it written by dad-fast?")
    classes = ClassMap.from_json(metadata[CLASSES])
    if class_map:
        given = ClassMap.from_csv(class_map)
        for ours, theirs in zip(classes.folders, given.folders, strict=False):
            if ours != theirs:
                number = classes.folders.index(ours)
                raise DataError(f"--class-map {class_map}: class {number} is {theirs!r}, but {ours!r} in {weights}; leave --class-map out")
        if len(classes) != len(given):
            raise DataError(f"--class-map {class_map}: {len(given)} classes, but {len(classes)} in {weights}; leave --class-map out")
    return classes


def _data_classes(names: Sequence[str], cfg: Config) -> ClassMap:
    """Without a checkpoint: the class map's classes, or those of the first split or folder that is judged."""
    if cfg.data.class_map:
        return ClassMap.from_csv(cfg.data.class_map)
    base = next((name for name in names if name.partition(":")[0] not in CORRUPTIONS), cfg.data.val_split)
    inside = cfg.data.data_dir.startswith(EMBEDDED) or is_split(cfg.data.data_dir, base) or not is_split("", base)
    return (open_source(cfg.data.data_dir, base) if inside else open_source(base)).classes


def _judge(
    model: Callable[[Tensor], Tensor], suites: Sequence[Suite], cfg: Config, own: tuple[int, float, str], title: str
) -> dict[str, Any]:
    """Results by suite, each printed when it is there. `own` is the model's image size, crop and interpolation."""
    print(f"\n{title}\n{HEADER}", flush=True)
    results = {}
    for suite in suites:
        result = evaluate(
            model,
            suite.source,
            name=suite.name,
            corruption=suite.corruption,
            img_size=cfg.augment.img_size or own[0],
            crop_pct=cfg.augment.crop_pct or own[1],
            interpolation=cfg.augment.interpolation or own[2],
            batch_size=cfg.eval.batch_size or cfg.data.batch_size,
            workers=cfg.data.workers,
            device=resolve_device(cfg.device),
            progress=_progress(suite.name) if sys.stderr.isatty() else None,
        )
        print(_row(result), flush=True)
        results[suite.name] = result.to_dict()
    return results


def _row(result: Result) -> str:
    top5 = "–" if result.top5 is None else f"{result.top5:.1f}"
    skipped = f"  ({result.skipped} unreadable left out)" if result.skipped else ""
    numbers = f"{result.num_images:>8} {result.top1:>8.1f} {top5:>8} {result.ece:>8.1f} {result.nll:>8.3f}"
    return f"{result.name:<28} {numbers}{skipped}"


def _progress(name: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        print(f"\r{name}: {done:,} of {total:,}" if done < total else "\r\x1b[K", end="", file=sys.stderr, flush=True)

    return show
