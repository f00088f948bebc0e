"""`dad-fast analyze`: distances of generated images to training and test images in a model's
feature space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dad_fast.config import Config
from dad_fast.config.options import AnalyzeLaunch
from dad_fast.config.schema import StudentConfig
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.splits import open_split
from dad_fast.data.sources.subset import Subset
from dad_fast.distributed.device import resolve_device
from dad_fast.engine import frozen
from dad_fast.engine.choices import settle
from dad_fast.engine.self_test import choose_kernels
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluation.metrics.intervals import mean_interval
from dad_fast.evaluation.runner import open_suites
from dad_fast.files import atomic_write_json, atomic_write_text
from dad_fast.loggers.environment import environment
from dad_fast.loggers.progress import count_progress
from dad_fast.models.load_student import load_student
from dad_fast.models.places import checkpoint_file
from dad_fast.models.student import Student, build_student
from dad_fast.models.weights.declared import CLASSES
from dad_fast.models.weights.files import sha256_file
from dad_fast.report.sheet import write_sheet
from dad_fast.tools.analyze import measure as engine
from dad_fast.tools.analyze.compare import compare
from dad_fast.tools.analyze.distances import mean_distance, vendi_score
from dad_fast.tools.analyze.measure import FILTERED, ImageSet
from dad_fast.tools.analyze.tables import markdown


def run(cfg: Config, launch: AnalyzeLaunch) -> int:
    """Write analysis.json, analysis.md and picture sheets; return the exit code.

    User errors fail before the first attack.
    """
    output = Path(launch.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder")
    device = resolve_device(cfg.device)
    cfg = settle(cfg, device)
    source = open_split(cfg.data, cfg.data.train_split)
    suites = open_suites(cfg.eval.suites or (cfg.data.val_split,), cfg.data, source.classes)

    frozen_teacher = frozen.teacher(cfg, source.classes, device)
    frozen_discretizer = frozen.discretizer(cfg, device)
    teacher, discretizer = frozen_teacher.model, frozen_discretizer.model
    student, about_student = _student(cfg, launch, source.classes)
    if student is not None:
        student = student.to(device).eval().requires_grad_(False)
    view = _view(cfg, len(source.classes), student, teacher.image_size)
    choose_kernels(cfg.engine, device, (), discretizer, view[0], cfg.data.batch_size)
    _check_size(student, view, device)
    features = engine.feature_space(launch.features, teacher, student)

    generators = engine.Generators(cfg, teacher, discretizer, student)
    rows = engine.choice(source.ok, launch.num_images, cfg.seed)
    images = Subset(source, rows, source.labels[rows])
    if student is None:
        print(
            "DAT is left out because it attacks a student; name a run's folder, or add --init-from "
            "RUN"
        )
    sets = engine.make_sets(
        cfg,
        images,
        teacher,
        features,
        generators,
        view,
        device,
        _progress("features of the sets"),
    )
    tests = {
        suite.name: engine.suite_features(
            cfg,
            suite,
            launch.num_images,
            features,
            view,
            device,
            _progress(f"features of {suite.name}"),
        )
        for suite in suites
    }

    counted = {
        name: one.counted(cfg.loss.filter and name in FILTERED) for name, one in sets.items()
    }
    options = {"projections": launch.projections, "resamples": launch.resamples, "seed": cfg.seed}
    distances = compare(counted, tests, **options, progress=_progress("comparing"))

    record = {
        "data": source.name,
        "features": launch.features,
        "num_images": len(images),
        "view": view.record(),
        "seed": cfg.seed,
        "filter": cfg.loss.filter,
        "attack": asdict(cfg.attack),
        "teacher": {
            "name": teacher.name,
            "fingerprint": frozen_teacher.fingerprint,
            "seen": teacher.provenance,
        },
        "discretizer": {
            "name": discretizer.name,
            "fingerprint": frozen_discretizer.fingerprint,
            "seen": discretizer.provenance,
        },
        "student": about_student,
        "sets": {
            name: _facts(sets, name, len(counted[name]), distances["size"], source.classes.names)
            for name in sets
        },
        "tests": {
            name: {"num_images": len(x), **_diversity(x[: distances["size"]])}
            for name, x in tests.items()
        },
        "distances": distances,
        "environment": environment(),
    }

    output.mkdir(parents=True, exist_ok=True)
    for name in ("random_q", "dat", "dad"):
        if name in sets:
            _sheet(output / f"sheet-{name.replace('_', '-')}.png", sets, name, source.classes.names)
    text = markdown(record)
    atomic_write_text(output / "analysis.md", text)
    atomic_write_json(output / "analysis.json", record)
    print(text + f"\n{output}: analysis.json, analysis.md and picture sheets")
    return 0


def _student(
    cfg: Config, launch: AnalyzeLaunch, classes: ClassMap
) -> tuple[Student | None, dict[str, Any] | None]:
    """Load the student that DAT attacks (a run, --init-from or --student-weights) and return it
    with its entry in the record.
    """
    named = launch.weights or cfg.student.init_from
    if named:
        path = checkpoint_file(named)
        student, metadata = load_student(path)
        if CLASSES in metadata and ClassMap.from_json(metadata[CLASSES]).folders != classes.folders:
            raise DataError(
                f"{path}: its classes are not those of {cfg.data.data_dir}; give its own --data-dir "
                "or --class-map"
            )
        return student, {
            "name": student.name,
            "file": str(path),
            "sha256": sha256_file(path),
            "method": metadata.get("dad_fast.method"),
        }
    if cfg.student.weights or cfg.student.pretrained:
        student = build_student(cfg.student, len(classes), cfg.augment.img_size)
        return student, {
            "name": student.name,
            "file": cfg.student.weights or "timm's pretrained weights",
        }
    return None, None


def _view(cfg: Config, num_classes: int, student: Student | None, teacher_size: int) -> View:
    """Return the student's view of an image in evaluation; without a student, the teacher's size
    and timm's usual crop.
    """
    if student is None and cfg.student.name:
        student = build_student(
            StudentConfig(name=cfg.student.name, model_kwargs=cfg.student.model_kwargs),
            num_classes,
            cfg.augment.img_size,
        )
    own = View(teacher_size, 0.875, "bicubic") if student is None else student.view
    return own.with_settings(cfg.augment)


@torch.no_grad()
def _check_size(student: Student | None, view: View, device: torch.device) -> None:
    """Run the student once. Raises UsageError if it does not take images of this size."""
    if student is None:
        return
    try:
        student(torch.zeros(1, 3, view.image_size, view.image_size, device=device))
    except RuntimeError as error:
        raise UsageError(
            f"--img-size {view.image_size}: {student.name} cannot take it ({str(error).splitlines()[0]})"
        ) from None


def _facts(
    sets: Mapping[str, ImageSet], name: str, num_counted: int, size: int, names: Sequence[str]
) -> dict[str, Any]:
    """Return the record of one set besides its distances.

    `moved` covers all images, also those that the loss does not count.
    """
    one, clean = sets[name], sets["clean"]
    moved = one.predicted != clean.predicted
    found = {
        "title": engine.TITLES[name],
        "num_images": len(one.predicted),
        "num_counted": num_counted,
        "teacher_top1": 100 * (one.predicted == one.labels).double().mean().item(),
        "codes_changed": None if one.changed is None else _mean(one.changed),
        **_diversity(one.features[:size]),
    }
    if name != "clean":
        moves = engine.moves(clean.predicted, one.predicted, names)
        top = [{"from": a, "to": b, "images": count} for a, b, count in moves]
        found["moved"] = {**_mean(moved.double()), "top": top}
    return found


def _mean(values: torch.Tensor) -> dict[str, Any]:
    return {
        "value": values.double().mean().item(),
        "interval": list(mean_interval(np.asarray(values, dtype=np.float64))),
    }


def _diversity(features: torch.Tensor) -> dict[str, float]:
    return {"mean_distance": mean_distance(features), "vendi_score": vendi_score(features)}


def _sheet(path: Path, sets: Mapping[str, ImageSet], name: str, names: Sequence[str]) -> None:
    """Draw a few images: clean, Q(clean), this set's, and the change."""
    one, clean = sets[name], sets["clean"]
    captions = []
    for i in range(min(engine.EXAMPLES, len(one.predicted))):
        label, predicted = int(one.labels[i]), int(one.predicted[i])
        lines = [names[label], "seen so" if predicted == label else f"seen as {names[predicted]}"]
        if one.changed is not None:
            lines.append(f"{one.changed[i]:.0%} codes")
        captions.append("\n".join(lines))

    originals, discretized, own = clean.examples, sets["q_clean"].examples, one.examples
    assert originals is not None and discretized is not None and own is not None
    write_sheet(path, originals, discretized, own, captions)


def _progress(text: str) -> Callable[[int, int], None]:
    return count_progress(text)
