"""`df.evaluate` and `df.export`: `dad-fast eval` and `dad-fast export` from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dad_fast.api.run import Run
from dad_fast.api.settings import by_path, names
from dad_fast.config.options import EvalLaunch, ExportOptions

if TYPE_CHECKING:
    from torch import nn

    from dad_fast.evaluation.models import EvalModel
    from dad_fast.tools.evaluate import Evaluation


def evaluate(
    model: str | Path | Run | nn.Module,
    *,
    suites: str | Sequence[str] = (),
    data_dir: str | Path | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model on test sets and corruptions, as `dad-fast eval` does.

    Prints each result as soon as it is known. Under torchrun every process makes the same call and
    evaluates its share of the images.

    Args:
        model: a run or its folder, a weights file, a name such as `timm:resnet50` or
            `open_clip:ARCH/TAG`, or an `nn.Module`: a student, a teacher, or one of your own
            (float32 pixels [B, 3, H, W] in [0, 1] -> logits [B, C]; give `img_size`).
        suites: test sets, splits, folders and corruptions (docs/eval.md), such as
            `["test", "contrast:3"]`. Empty: those of the run, or the validation split.
        data_dir: data of the splits. None: that of the run.
        **settings: flags of `dad-fast eval` that are settings, by name: `batch_size`, `workers`,
            `device`, `img_size`, `teacher` (evaluated for the agreement), `allow_partial`, …

    Returns:
        Suite -> metrics: `top1`, `top5`, `ece` in %, `nll` in nats, `num_images`, intervals and
        more, as `--json` writes them.

    Raises:
        UsageError: a suite or a setting is unknown. DataError: data or weights cannot be used.
        EnvironmentProblem: a package, a download or a device is missing.
    """
    from dad_fast.cli.eval import SETTINGS
    from dad_fast.distributed import process_group as distributed
    from dad_fast.evaluation.suites.open import check_suites
    from dad_fast.models.own_modules import passed
    from dad_fast.tools.evaluate import Evaluation
    from dad_fast.tools.evaluate_checks import Job, checked, settings_of

    given: dict[str, Any] = {"data_dir": data_dir, **settings}
    if wanted := names(suites):
        given["suite"] = wanted
    flags = by_path(given, only=SETTINGS)
    own = model.student if isinstance(model, Run) else None
    if isinstance(model, Run):
        model = model.folder
    if isinstance(model, str | Path):
        job = checked(EvalLaunch(model=str(model)), flags)
    else:
        job = Job(EvalLaunch(), settings_of([], flags), (), ())
        check_suites(job.suites, job.cfg.data)
    with distributed.joined(job.cfg), passed(student=own):
        evaluation = Evaluation(job)
        if isinstance(model, str | Path):
            subject = evaluation.load(str(model))
        else:
            subject = _subject(model, evaluation)
        found = evaluation.evaluate(subject)
    results: dict[str, dict[str, Any]] = found.to_dict()["suites"]
    return results


def _subject(model: nn.Module, evaluation: Evaluation) -> EvalModel:
    """Wrap a module for evaluation. Raises UsageError for other classes than the data's."""
    from dad_fast.config.schema import StudentConfig
    from dad_fast.errors import UsageError
    from dad_fast.evaluation.models import EvalModel, of_teacher
    from dad_fast.models.own_modules import module_name, passed
    from dad_fast.models.student import Student, build_student
    from dad_fast.models.teacher import Teacher

    if isinstance(model, Teacher):
        return of_teacher(model.to(evaluation.device))
    classes = evaluation.data_classes()
    if isinstance(model, Student):
        student = model
    else:
        named = StudentConfig(name=module_name(model))
        with passed(student=model):
            student = build_student(named, len(classes), evaluation.cfg.augment.img_size)
    if student.num_classes != len(classes):
        raise UsageError(
            f"{student.name}: {student.num_classes} outputs, but the data has {len(classes)} "
            "classes; evaluate the run's folder, which has recorded its classes"
        )
    moved = student.to(evaluation.device).eval()
    return EvalModel(student.name, student.name, moved, classes, student.view)


def export(
    run: str | Path | Run,
    output: str | Path,
    *,
    format: str | Sequence[str] = (),
    weights: str = "",
    overwrite: bool = False,
    push: str = "",
) -> Path:
    """Export a student with its model card, as `dad-fast export` does.

    Every file is read back and compared with the student first; the differences are printed.

    Args:
        run: a run or its folder, a checkpoint's folder, or a model.safetensors.
        output: the new folder.
        format: `timm` (model.safetensors and config.json), `onnx` (pixels [B, 3, H, W] in [0, 1] ->
            logits), `torch` (torch.export), or several. Empty: `timm`, or `onnx` for what timm
            cannot build.
        weights: `ema` or `raw`; empty = those of the evaluation.
        overwrite: replace an earlier export.
        push: USER/REPO of the Hugging Face hub, to which the folder is uploaded. Without a login
            nothing is uploaded; the files and the head of the card are printed.

    Returns:
        `output`.

    Raises:
        UsageError: an unknown format, a folder that is not empty, or `push` of a run without
            results.
        DataError: no such run.
        EnvironmentProblem: packages of the extra `export` are missing, or the hub cannot be reached
            or refuses the upload.
    """
    from dad_fast.cli.export import check_formats
    from dad_fast.errors import UsageError
    from dad_fast.models.own_modules import passed
    from dad_fast.tools.export import run as command

    if weights not in ("", "ema", "raw"):
        raise UsageError(f"weights={weights!r}: must be ema or raw")
    own = run.student if isinstance(run, Run) else None
    options = ExportOptions(
        checkpoint=str(run.folder if isinstance(run, Run) else run),
        output=str(output),
        formats=check_formats(names(format)),
        weights=weights,
        overwrite=overwrite,
        push=push,
    )
    with passed(student=own):
        command.run(options)
    return Path(output)
