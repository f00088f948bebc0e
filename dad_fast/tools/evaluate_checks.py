"""Check names, paths and outputs of `dad-fast eval`, and gather its settings.

Imports no torch, so that a wrong path is an error within a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dad_fast.config import Config
from dad_fast.config.fields import coerce, settings, with_values
from dad_fast.config.options import EvalLaunch
from dad_fast.config.schema import TeacherConfig
from dad_fast.config.setting import AUTO
from dad_fast.data.classes import ClassMap
from dad_fast.engine.preflight import check_weights
from dad_fast.errors import UsageError
from dad_fast.evaluation.metrics.record_files import is_records
from dad_fast.evaluation.suites.open import check_suites, check_unknown
from dad_fast.models.places import TENSORS, checkpoint_file, run_settings
from dad_fast.models.registry import names_teacher


@dataclass(frozen=True)
class Job:
    """What to evaluate. models: names of models to load; files: of predictions to compare."""

    launch: EvalLaunch
    cfg: Config
    models: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def suites(self) -> tuple[str, ...]:
        return self.cfg.eval.suites or (self.cfg.data.val_split,)


def checked(launch: EvalLaunch, flags: Mapping[str, Any]) -> Job:
    """Return the job of a command line, whose names and paths exist.

    flags: paths of settings -> typed values; the others come from the run's config.toml.
    """
    check_outputs(launch)
    files = tuple(name for name in launch.compare if is_records(name))
    if files and len(files) == len(launch.compare):
        _check_files_alone(launch)
        return Job(launch, Config(), (), files)
    if not launch.model and not launch.compare and not flags.get("teacher.name"):
        # --suite takes all names that follow it.
        before = " before --suite" if "eval.suites" in flags else ""
        raise UsageError(
            "nothing to evaluate: name a model (a run's folder, a .safetensors file, "
            f"timm:NAME@FILE){before}, or a --teacher"
        )
    if launch.calibrate:
        _check_calibration(launch)
    names = launch.compare or (launch.model,)
    models = tuple(name for name in names if name and name not in files)
    cfg = settings_of([name for name in models if not names_teacher(name)], flags)
    for name in models:
        if names_teacher(name):
            check_weights(with_values(Config(), {"teacher.name": name}), True, False)
    if cfg.teacher.name:
        check_weights(cfg, teacher=True, discretizer=False)
    if cfg.data.class_map:
        ClassMap.from_csv(cfg.data.class_map)
    job = Job(launch, cfg, models, files)
    check_suites(job.suites, cfg.data)
    check_unknown(launch.ood, cfg.data)
    return job


def check_outputs(launch: EvalLaunch) -> None:
    """Raise UsageError for output paths in no folder, or that would replace other files."""
    for flag, path in (("--json", launch.json), ("--csv", launch.csv)):
        suffix = flag.replace("--", ".")
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise UsageError(f"{flag} {path}: name a file in a folder that exists")
        if path and Path(path).exists() and Path(path).suffix != suffix:
            raise UsageError(
                f"{flag} {path}: exists and does not end in {suffix}, so it is not replaced; name "
                "another file"
            )
    if launch.predictions and Path(launch.predictions).is_file():
        raise UsageError(
            f"--save-predictions {launch.predictions}: is a file; name a folder, which gets a file "
            "for each model"
        )


def _check_files_alone(launch: EvalLaunch) -> None:
    given = {
        "--csv": launch.csv,
        "--save-predictions": launch.predictions,
        "--ood": launch.ood,
        "--baselines": launch.baselines,
    }
    if unused := [flag for flag, value in given.items() if value]:
        raise UsageError(
            f"{unused[0]}: --compare of two files of predictions evaluates no model; leave "
            f"{unused[0]} out"
        )


def _check_calibration(launch: EvalLaunch) -> None:
    """Raise UsageError unless --calibrate can store its temperature."""
    if launch.compare or not launch.model:
        raise UsageError("--calibrate stores a temperature with one model: name it, not --compare")
    file_to_calibrate(launch.model)


def file_to_calibrate(model: str) -> Path:
    """Return the file that will hold the temperature. Raises UsageError for a model without one."""
    if names_teacher(model):
        raise UsageError(
            f"--calibrate: {model} has no file of dad-fast to store the temperature in; name a run"
        )
    path = checkpoint_file(model)
    if (path.parent / TENSORS).is_file():
        raise UsageError(
            f"--calibrate: {path} belongs to a checkpoint, which is not changed; name a finished "
            "run or an export"
        )
    return path


def settings_of(runs: Sequence[str], flags: Mapping[str, Any]) -> Config:
    """Return the settings of the first run among the models, overridden by the typed flags."""
    found = [run_settings(checkpoint_file(run))[0] for run in runs]
    cfg = next((one for one in found if one is not None), Config())
    values = {
        path: coerce(settings()[path], value, settings()[path].flag)
        for path, value in flags.items()
    }
    if values.get("data.batch_size") == AUTO:
        # The batch of the run, or else the default.
        del values["data.batch_size"]
    # The run's teacher is evaluated only on request, the image size is the model's own, and PIL
    # decodes. --batch-size is the batch of this command.
    cfg = with_values(
        cfg,
        {
            "teacher": TeacherConfig(),
            "device": "auto",
            "augment.img_size": 0,
            "data.loader": "torchvision",
        },
    )
    cfg = with_values(cfg, values | ({"eval.batch_size": 0} if "data.batch_size" in values else {}))
    if not cfg.data.data_dir and not cfg.eval.suites:
        raise UsageError(
            "no data: add --data-dir (an image folder or embedded:digits); no config.toml next to "
            "the checkpoint names it"
        )
    return cfg
