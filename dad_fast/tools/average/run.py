"""`dad-fast average`: write the mean of several students' weights; evaluate the way to it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dad_fast.config import Config
from dad_fast.config.options import AverageOptions
from dad_fast.distributed.device import resolve_device
from dad_fast.errors import UsageError
from dad_fast.evaluation.runner import Suite, evaluate, open_suites
from dad_fast.files import atomic_write_json
from dad_fast.locks import LOCK, lock_folder
from dad_fast.loggers.environment import environment
from dad_fast.loggers.progress import count_progress
from dad_fast.models.places import checkpoint_file, run_settings
from dad_fast.models.student import Student, save_student
from dad_fast.models.weights.declared import CLASSES
from dad_fast.tools.average.soup import Member, average, check_alike, estimate_batch_norm
from dad_fast.tools.evaluate_checks import settings_of

WEIGHTS, RECORD = "model.safetensors", "average.json"
AVERAGED = "dad_fast.averaged"


def run(options: AverageOptions, flags: Mapping[str, Any]) -> int:
    """Return the exit code. `flags` maps paths of settings to typed values."""
    target = Path(options.output).absolute()
    _check_target(target, options.overwrite)
    weights = _weights(options)
    given = [*options.models, *([options.interpolate] if options.interpolate else [])]
    members = [Member.load(name) for name in given]
    check_alike(members)
    work = None
    if bool(options.interpolate) or "data.data_dir" in flags:
        cfg = settings_of(given, flags)
        work = _Work(cfg, members, flags, evaluates=bool(options.interpolate))
    has_batch_norm = members[0].student.has_batch_stats
    if "data.data_dir" in flags and not options.interpolate and not has_batch_norm:
        raise UsageError(
            f"--data-dir: {members[0].student.name} has no batch norm, and without --interpolate "
            "nothing is evaluated; leave it out"
        )

    with lock_folder(target, target.parent / f".{target.name}{LOCK}"):
        found = _Averager(members, weights, options, work).run()
        target.mkdir(parents=True, exist_ok=True)
        save_student(target / WEIGHTS, found.student, found.metadata())
        atomic_write_json(target / RECORD, found.record())
    for line in found.lines():
        print(line)
    evaluate_it = ["dad-fast", "eval", options.output, "--data-dir", _data_of(members) or "DIR"]
    print(f"{options.output}: {WEIGHTS}, {RECORD}; evaluate it with {shlex.join(evaluate_it)}")
    return 0


def _data_of(members: Sequence[Member]) -> str:
    """Return the data directory of the first run among the members, or ""."""
    found = [run_settings(checkpoint_file(member.name))[0] for member in members]
    return next((cfg.data.data_dir for cfg in found if cfg is not None), "")


class _Work:
    """Data for evaluations and for batch norm."""

    def __init__(
        self, cfg: Config, members: Sequence[Member], flags: Mapping[str, Any], evaluates: bool
    ) -> None:
        self.cfg = cfg
        self.device: torch.device = resolve_device(cfg.device)
        self.estimates = "data.data_dir" in flags and members[0].student.has_batch_stats
        classes = members[0].classes
        self.suites: list[Suite] = []
        if evaluates:
            names = cfg.eval.suites or (cfg.data.val_split,)
            self.suites = open_suites(names, cfg.data, classes, cfg.eval)
        self.train: Suite | None = None
        if self.estimates:
            (self.train,) = open_suites((cfg.data.train_split,), cfg.data, classes, cfg.eval)

    @property
    def batch_size(self) -> int:
        return self.cfg.eval.batch_size or self.cfg.data.batch_size

    def estimate(self, student: Student) -> int:
        """Estimate the batch-norm statistics; return the number of images."""
        assert self.train is not None
        student.to(self.device)
        workers = self.cfg.data.workers
        return estimate_batch_norm(
            student, self.train.source, self.batch_size, workers, self.device
        )

    def top1(self, student: Student, label: str) -> dict[str, float]:
        """Return top-1 in % by suite."""
        student.to(self.device)
        return {suite.name: self._evaluated(student, suite, label) for suite in self.suites}

    def _evaluated(self, student: Student, suite: Suite, label: str) -> float:
        progress: Callable[[int, int], None] = count_progress(f"{label}, {suite.name}")
        return evaluate(
            student,
            suite.source,
            name=suite.name,
            corruption=suite.corruption,
            view=student.view,
            batch_size=self.batch_size,
            workers=self.cfg.data.workers,
            device=self.device,
            progress=progress,
        ).top1


class _Averager:
    """Makes the average; afterwards `student` is what to write."""

    student: Student

    def __init__(
        self,
        members: Sequence[Member],
        weights: Sequence[float],
        options: AverageOptions,
        work: _Work | None,
    ) -> None:
        self.members, self.weights, self.options, self.work = members, weights, options, work
        self.curve: list[dict[str, Any]] = []
        self.num_images = 0

    def run(self) -> _Averager:
        if self.options.interpolate:
            for alpha in np.linspace(0, 1, self.options.points).tolist():
                student = self._made(alpha)
                assert self.work is not None
                top1 = self.work.top1(student, f"alpha {alpha:.2f}")
                self.curve.append({"alpha": alpha, "top1": top1, **_out_of_distribution(top1)})
        self.student = self._made(self.options.alpha if self.options.interpolate else 1.0).cpu()
        return self

    def _made(self, alpha: float) -> Student:
        """Return (1 - alpha) START + alpha AVERAGE."""
        student = average(self.members, self._shares(alpha))
        if self.work is not None and self.work.estimates:
            self.num_images = self.work.estimate(student)
        return student

    def _shares(self, alpha: float) -> list[float]:
        """Return the weight of each member; START, if given, is the last."""
        if not self.options.interpolate:
            return list(self.weights)
        return [*(alpha * weight for weight in self.weights), 1 - alpha]

    @property
    def batch_norm(self) -> str | None:
        """How the statistics of batch norm were made; None for a model without."""
        if not self.members[0].student.has_batch_stats:
            return None
        if not self.num_images:
            return "averaged"
        return f"estimated on {self.num_images:,} images of the training split"

    def record(self) -> dict[str, Any]:
        """Return the content of average.json."""
        shares = self._shares(self.options.alpha if self.options.interpolate else 1.0)
        record: dict[str, Any] = {
            "members": [
                {"name": member.name, "sha256": member.sha256, "weight": share}
                for member, share in zip(self.members, shares, strict=True)
            ],
            "batch_norm": self.batch_norm,
        }
        if self.curve:
            record |= {
                "start": self.options.interpolate,
                "alpha": self.options.alpha,
                "in_distribution": next(iter(self.curve[0]["top1"])),
                "curve": self.curve,
            }
        return record | {"environment": environment()}

    def metadata(self) -> dict[str, str]:
        first = self.members[0].metadata
        methods = {member.metadata.get("dad_fast.method", "") for member in self.members}
        members = self.record()["members"]
        return {
            **self.student.contents()[1],
            CLASSES: first[CLASSES],
            "dad_fast.method": methods.pop() if len(methods) == 1 else "",
            "dad_fast.ema": "false",
            AVERAGED: json.dumps([[one["sha256"], one["weight"]] for one in members]),
        }

    def lines(self) -> list[str]:
        """Return the table of the curve and the notes."""
        lines = []
        if self.curve:
            names = list(self.curve[0]["top1"])
            headings = [*names, *(["mean of others"] if len(names) > 2 else [])]
            lines.append("alpha  " + "  ".join(f"{name:>14}" for name in headings))
            for point in self.curve:
                values = [*point["top1"].values(), *([point["mean"]] if len(names) > 2 else [])]
                cells = "  ".join(f"{value:>14.1f}" for value in values)
                lines.append(f"{point['alpha']:>5.2f}  {cells}")
            lines.append(
                f"top-1 in %; alpha 0 is {self.options.interpolate}, 1 the average; "
                f"{names[0]} stands for in-distribution; written: alpha {self.options.alpha:g}"
            )
        if self.batch_norm == "averaged":
            lines.append(
                "batch norm: the running statistics are averaged, which need not fit the averaged "
                "weights; --data-dir DIR estimates them on its training split"
            )
        elif self.batch_norm:
            lines.append(f"batch norm: running statistics {self.batch_norm}")
        return lines


def _out_of_distribution(top1: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over the suites after the first, if there are several."""
    others = list(top1.values())[1:]
    return {"mean": float(np.mean(others))} if others else {}


def _weights(options: AverageOptions) -> list[float]:
    """Return the weights of the models, adding up to 1. Raises UsageError."""
    if not options.weights:
        return [1 / len(options.models)] * len(options.models)
    try:
        weights = [float(text) for text in options.weights]
    except ValueError:
        weights = []
    total = sum(weights)
    if len(weights) != len(options.models) or not (0 < total < float("inf")) or min(weights) < 0:
        raise UsageError(
            f"--weights {' '.join(options.weights)}: give {len(options.models)} numbers, one for "
            "each model, 0 or more and not all 0"
        )
    return [weight / total for weight in weights]


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise UsageError unless `target` is new, empty, or an average and `overwrite` is set."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"-o {target}: is no folder; name a new one")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / RECORD).is_file():
        raise UsageError(f"-o {target}: holds no average, so it is not replaced; name another")
    if not overwrite:
        raise UsageError(f"-o {target}: exists; add --overwrite, or name another folder")
