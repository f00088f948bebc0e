"""`df.train`: `dad-fast train` from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dad_fast.api.run import Run
from dad_fast.api.settings import by_path, files, names
from dad_fast.config import Config, Launch
from dad_fast.config.fields import with_values
from dad_fast.config.resolve import gather
from dad_fast.errors import UsageError
from dad_fast.methods.settings import check
from dad_fast.models.registry import MODULE

if TYPE_CHECKING:
    from torch import nn


def train(
    *,
    output: str | Path,
    preset: str | Sequence[str] = (),
    config: str | Path | Sequence[str | Path] = (),
    data_dir: str | Path | None = None,
    method: str | None = None,
    student: str | nn.Module | Sequence[str] | None = None,
    teacher: str | nn.Module | None = None,
    resume: str | Path | bool = "",
    overwrite: bool = False,
    allow_config_change: bool = False,
    set: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Train a student, or every variant and seed of a comparison, as `dad-fast train` does.

    Runs in this process: in a notebook, in a script, and in a script that torchrun starts (then
    every process makes the same call; the first one writes). The log goes to stderr, a table of the
    results to stdout. In the main thread, Ctrl-C, SIGTERM and SIGUSR1 save the run and raise; in
    another thread no signal is handled.

    Args:
        output: the run's folder. It must be new or empty, unless `resume` or `overwrite` is given.
        preset: name of a preset, or several, of which later ones override.
        config: TOML file with settings, or several. They override presets.
        data_dir: image folder, shards or `embedded:digits`.
        method: `ce`, `kd`, `dad`, … (docs/methods.md).
        student: a timm model's name, or an `nn.Module` of your own: float32 pixels [B, 3, H, W] ->
            logits [B, C], C classes of the data. A copy is trained, from the module's present
            weights in every run. Pixels are in [0, 1]; a module of timm (with a `pretrained_cfg`)
            gets them normalised as that says. Give `img_size` too. Checkpoints then hold weights
            without the class: pass the module again to resume. Several names are students that
            learn from the same batches, each in a folder of its own, `output`/NAME/seed-0:
            `run.find(NAME)`.
        teacher: a teacher's name (docs/models.md), or an `nn.Module` as above with logits of the
            data's classes in their order; a frozen copy is used. `teacher_img_size` is the side of
            its images in pixels, by default that of the student.
        resume: "auto" or True continues the run in `output` with the same settings, or starts it; a
            checkpoint's folder starts from that.
        overwrite: replace an existing run.
        allow_config_change: resume although settings that change the result differ.
        set: settings by key, for those without a flag: `{"optim.opt_kwargs": {"eps": 1e-6}}`.
        **settings: settings by the names of their flags with underscores: `epochs=5`, `lr=1e-3`,
            `batch_size=64`, `max_steps=20`, `seeds=3`, `discretizer="jpeg:75"`, `device="cuda:1"`
            (`dad-fast train --help-all`). They override presets and files.

    Returns:
        The run, also for one that had finished before. Of several variants, students or seeds it is
        the comparison, and `runs` and `find` return its runs.

    Raises:
        UsageError: a setting is unknown or wrong, settings do not fit together, or `output` exists.
        DataError: images, weights or classes cannot be used.
        EnvironmentProblem: a package, a download or a device is missing.
        NotFinite: the loss is not finite; the state before is saved.
        Interrupted, Preempted: stopped by Ctrl-C or a signal; the state is saved.
    """
    modules = {"student": student, "teacher": teacher}
    given = by_path({"data_dir": data_dir, "method": method, **settings}, set)
    given |= _model_settings(modules, given)
    cfg = _with_teacher_size(gather(names(preset), files(config), (), given))
    check(cfg)
    launch = Launch(
        output=str(output),
        resume="auto" if resume is True else str(resume or ""),
        overwrite=overwrite,
        allow_config_change=allow_config_change,
        preset="+".join(names(preset)),
        both_batch_sizes={"data.batch_size", "data.global_batch_size"} <= given.keys(),
    )
    if launch.resume and overwrite:
        raise UsageError("resume continues a run and overwrite replaces it: leave one out")

    from dad_fast.models.own_modules import passed
    from dad_fast.sweep.train import run_in_this_process

    with passed(**modules):
        run_in_this_process(cfg, launch)
    return Run(output, student=None if isinstance(student, str | Sequence) else student)


def _model_settings(modules: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that name the models.

    A module of the user's replaces what a preset says about the weights of a timm model.
    """
    found: dict[str, Any] = {}
    for role, model in modules.items():
        if model is None:
            continue
        if isinstance(model, str | Path):
            found[f"{role}.name"] = str(model)
            continue
        if isinstance(model, Sequence):
            if not all(isinstance(name, str) for name in model):
                raise UsageError("student: several students are names; a module is trained alone")
            found[f"{role}.name"] = list(model)
            continue
        from dad_fast.models.own_modules import TIMM_ONLY, module_name

        found[f"{role}.name"] = module_name(model)
        if role == "student":
            unset = Config().student
            reset = {f"student.{key}": getattr(unset, key) for key in TIMM_ONLY}
            found |= {path: value for path, value in reset.items() if path not in given}
    return found


def _with_teacher_size(cfg: Config) -> Config:
    """Give a teacher of the user's own the student's image size, unless it has its own."""
    if cfg.teacher.name.startswith(MODULE) and not cfg.teacher.img_size:
        return with_values(cfg, {"teacher.img_size": cfg.augment.img_size})
    return cfg
