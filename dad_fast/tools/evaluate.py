"""`dad-fast eval`: evaluate models on test sets and corruptions, next to a teacher, or compare two
models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dad_fast.config.fields import nearest
from dad_fast.config.options import EvalLaunch
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.choose import check_dali
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.device import resolve_device
from dad_fast.distributed.launch import (
    end_with_launcher,
    is_worker,
    number_of_processes,
    run_processes,
)
from dad_fast.distributed.signals import ends_at_once, stop_requests
from dad_fast.errors import UsageError, discard_output
from dad_fast.evaluation import public_models, show
from dad_fast.evaluation.columns import terminal_width
from dad_fast.evaluation.metrics.effective_robustness import effective_robustness, read_baselines
from dad_fast.evaluation.metrics.ood_detection import detect
from dad_fast.evaluation.metrics.paired_tests import agreement, compare
from dad_fast.evaluation.metrics.predictions import Records, load_records, save_records
from dad_fast.evaluation.metrics.result import Result, with_intervals
from dad_fast.evaluation.models import EvalModel, load_subject, of_teacher
from dad_fast.evaluation.runner import Suite, evaluate, records_of
from dad_fast.evaluation.suites.base import as_eval_set
from dad_fast.evaluation.suites.open import Unknown, classes_of, open_suites, open_unknown
from dad_fast.files import atomic_write_json
from dad_fast.loggers.environment import environment
from dad_fast.loggers.progress import count_progress
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.student import Student
from dad_fast.tools import calibrate
from dad_fast.tools.evaluate_checks import Job, file_to_calibrate

STOPPED = "stopped: the results above are complete; run the same command again"


@dataclass
class Found:
    """All results of one model."""

    subject: EvalModel
    results: dict[str, Result] = field(default_factory=dict)
    id_suite: str = ""
    ood: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    robustness: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        record = {
            **self.subject.facts,
            "classes": self.subject.classes.names,
            "suites": {name: result.to_dict() for name, result in self.results.items()},
        }
        if self.ood or self.robustness:
            record |= {
                "id_suite": self.id_suite,
                "ood": self.ood,
                "effective_robustness": self.robustness,
            }
        return record


def run(job: Job) -> int:
    """Return the exit code."""
    launch = job.launch
    if not job.models and len(job.files) == 2:
        return _compare(launch, {name: load_records(name)[1] for name in job.files}, {})
    if launch.calibrate and (is_worker() or number_of_processes(launch.nproc) > 1):
        raise UsageError("--calibrate runs in one process: leave --nproc out")
    if is_worker():
        end_with_launcher()
    elif (nproc := number_of_processes(launch.nproc)) > 1:
        return run_processes(nproc, "eval", launch.arguments)
    with distributed.joined(job.cfg), ends_at_once(STOPPED):
        return Evaluation(job).run()


class Evaluation:
    """Evaluates models on the suites of a job and prints each result as soon as it is known."""

    def __init__(self, job: Job) -> None:
        self.job, self.cfg, self.launch = job, job.cfg, job.launch
        cfg, launch = job.cfg, job.launch
        self.device = resolve_device(cfg.device)
        self.log = Printer(launch)
        self.dali = cfg.data.loader == "dali"
        if self.dali:
            check_dali()
        self.suite_names = job.suites
        self.baselines: Sequence[Mapping[str, float]] = []
        if launch.baselines:
            is_table = launch.baselines == public_models.NAME
            by_timm = public_models.as_baselines
            self.baselines = by_timm() if is_table else read_baselines(launch.baselines)
        self.teacher_results: dict[ClassMap, Found] = {}

    def run(self) -> int:
        names = self.job.models
        record: dict[str, Any] = {
            "data_dir": self.cfg.data.data_dir,
            "decoder": "DALI" if self.dali else "PIL",
            "checkpoint": None,
            "teacher": None,
        }
        found = {}
        for name in names:
            subject = self.load(name)
            if self.launch.calibrate:
                record["calibration"] = self.calibrate(subject)
                subject = self.load(name)
            found[name] = self.evaluate(subject)
        if self.launch.calibrate:
            self.compare_calibration(record["calibration"], found[names[0]])
        if not found:
            self.teacher(self.data_classes())
        if not distributed.is_main():
            return 0

        everything = {
            **found,
            **{f"teacher {one.subject.name}": one for one in self.teacher_results.values()},
        }
        if self.teacher_results:
            record["teacher"] = next(iter(self.teacher_results.values())).to_dict()
        if self.launch.predictions:
            for name, one in everything.items():
                path = _save(Path(self.launch.predictions), name, one)
                self.log(f"{path}: predictions of {name} for each image")

        tables = {name: one.to_dict() for name, one in everything.items()}
        if self.launch.csv:
            show.write_csv(self.launch.csv, tables)
        if self.launch.compare:
            records = {
                name: {suite: r.records for suite, r in one.results.items() if r.records}
                for name, one in found.items()
            }
            records |= {
                name: load_records(name)[1] for name in self.launch.compare if name not in found
            }
            return _compare(self.launch, records, {**record, "models": tables})
        if found:
            record["checkpoint"] = tables[names[0]]
        if self.launch.json:
            atomic_write_json(self.launch.json, {**record, "environment": environment()})
        return 0

    def load(self, name: str) -> EvalModel:
        """Load a run's student or a published model by its name."""
        return load_subject(name, self.cfg, self.data_classes, self.device)

    def data_classes(self) -> ClassMap:
        return classes_of(self.suite_names, self.cfg.data)

    def teacher(self, classes: ClassMap) -> Found | None:
        """Return the teacher's results for models with these classes, or None without --teacher."""
        if self.cfg.teacher.name and classes not in self.teacher_results:
            teacher = load_teacher(
                self.cfg.teacher,
                classes,
                self.cfg.precision,
                self.device,
                temperature=self.cfg.loss.temperature,
            )
            self.teacher_results[classes] = self._evaluate(
                of_teacher(teacher), f"teacher {teacher.name}", None
            )
            self.log(f"teacher {teacher.name} (trained on: {teacher.provenance})")
        return self.teacher_results.get(classes)

    def evaluate(self, subject: EvalModel) -> Found:
        return self._evaluate(subject, subject.title, self.teacher(subject.classes))

    def calibrate(self, subject: EvalModel) -> dict[str, Any]:
        """Fit a temperature and store it with the model.

        Returns facts for the results, with the ECE of every suite before; `compare_calibration` adds
        the ECE after.
        """
        split, student = self.launch.calibrate, subject.model
        assert isinstance(student, Student)
        student.calibration = None
        eval_set = calibrate.open_split(split, self.cfg, subject)
        found, facts = calibrate.fit(
            subject,
            eval_set,
            split,
            self.view(subject),
            self.batch_size,
            self.cfg.data.workers,
            self.device,
            _progress(f"calibrating on {split}"),
        )
        suites = open_suites(self.suite_names, self.cfg.data, subject.classes, self.cfg.eval)
        ece = {suite.name: [self.result(subject, suite).ece] for suite in suites}
        file = file_to_calibrate(subject.name)
        calibrate.store(file, found)
        self.log(f"{file}: {found}, is stored with the model; eval, predict and export use it")
        return {**facts, "ece": ece}

    def compare_calibration(self, facts: dict[str, Any], after: Found) -> None:
        """Add the ECE of the calibrated model and print both."""
        for name, result in after.results.items():
            facts["ece"][name].append(result.ece)
        for line in ("", *show.calibration_lines(facts)):
            self.log(line)

    def _evaluate(self, subject: EvalModel, title: str, teacher: Found | None) -> Found:
        """Evaluate on every suite and print each result as soon as it is known."""
        with distributed.main_first():  # the other ranks then find its index files
            suites = open_suites(self.suite_names, self.cfg.data, subject.classes, self.cfg.eval)
            found = Found(subject, id_suite=self.id_suite(suites))
            unknown = self.unknown(subject, suites, found.id_suite)

        layout = show.results_layout(terminal_width(), with_teacher=teacher is not None)
        self.log(f"\n{title}, {len(subject.classes):,} classes\n{layout.header()}")
        for suite in suites:
            result = with_intervals(self.result(subject, suite))
            theirs = teacher.results[suite.name].records if teacher is not None else None
            if result.records and theirs:
                result = replace(result, agreement=agreement(result.records, theirs))
            self.log(show.row(result, layout))
            found.results[suite.name] = result
        for line in (*show.notes(found.results), layout.note()):
            if line:
                self.log(f"  {line}")

        if self.launch.per_class:
            for line in ("", *show.class_lines(found.results, subject.classes.names)):
                self.log(line)

        if unknown:
            found.ood = self.detect(subject, found, unknown)
            for line in ("", *show.detection_lines(found.id_suite, found.ood, terminal_width())):
                self.log(line)

        if self.baselines:
            tops = {name: result.top1 for name, result in found.results.items()}
            found.robustness = effective_robustness(self.baselines, tops, found.id_suite)
            for line in ("", *show.robustness_lines(found.robustness)):
                self.log(line)
        return found

    def result(self, subject: EvalModel, suite: Suite) -> Result:
        with stop_requests():
            return evaluate(
                subject.model,
                suite.source,
                name=suite.name,
                corruption=suite.corruption,
                view=self.view(subject),
                batch_size=self.batch_size,
                workers=self.cfg.data.workers,
                device=self.device,
                progress=_progress(suite.name),
                dali=self.dali,
                stopped=STOPPED,
            )

    def unknown(self, subject: EvalModel, suites: Sequence[Suite], id_suite: str) -> list[Unknown]:
        """Open the sets of --ood before the first evaluation, so that a missing one fails fast."""
        known = next(suite.source for suite in suites if suite.name == id_suite)
        columns = as_eval_set(known).columns
        return [
            open_unknown(name, self.cfg.data, subject.classes, self.cfg.eval, columns)
            for name in self.launch.ood
        ]

    def detect(
        self, subject: EvalModel, found: Found, sets: Sequence[Unknown]
    ) -> dict[str, dict[str, dict[str, float]]]:
        known = found.results[found.id_suite].records
        assert known is not None
        ood = {}
        for label, eval_set, corruption in sets:
            with stop_requests():
                unknown, _ = records_of(
                    subject.model,
                    eval_set,
                    eval_set.view_for(self.view(subject)),
                    self.batch_size,
                    self.cfg.data.workers,
                    self.device,
                    corruption,
                    _progress(label),
                    self.dali,
                    STOPPED,
                )
            ood[label] = detect(known, unknown)
        return ood

    def id_suite(self, suites: Sequence[Suite]) -> str:
        """Return the name of the in-distribution suite: that of --id-suite, or the first without a
        corruption.
        """
        known = [suite.name for suite in suites]
        wanted = self.launch.id_suite
        if wanted and wanted not in known:
            raise UsageError(
                f"--id-suite {wanted}: not among the evaluated suites "
                f"({', '.join(known)}){nearest(wanted, known)}"
            )
        uncorrupted = (suite.name for suite in suites if suite.corruption is None)
        return wanted or next(uncorrupted, known[0])

    def view(self, subject: EvalModel) -> View:
        return subject.view.with_settings(self.cfg.augment)

    @property
    def batch_size(self) -> int:
        return self.cfg.eval.batch_size or self.cfg.data.batch_size


def _compare(
    launch: EvalLaunch, records: Mapping[str, Mapping[str, Records]], record: Mapping[str, Any]
) -> int:
    """Print and write the paired comparison of two models on every suite that both were evaluated
    on.
    """
    first, second = launch.compare
    both = [suite for suite in records[first] if suite in records[second]]
    if not both:
        have = f"{first} has {', '.join(records[first])}; {second} has {', '.join(records[second])}"
        raise UsageError(f"--compare: the models share no suite ({have})")
    found = {suite: compare(suite, records[first][suite], records[second][suite]) for suite in both}
    log = Printer(launch)
    log("")
    for line in show.comparison_lines((first, second), found, terminal_width()):
        log(line)
    if launch.json:
        compared = {"first": first, "second": second, "suites": found}
        atomic_write_json(
            launch.json, {**record, "comparison": compared, "environment": environment()}
        )
    return 0


def _save(folder: Path, name: str, found: Found) -> Path:
    path = folder / (re.sub(r"[^\w.@-]+", "_", name).strip("_.") + ".safetensors")
    about = {**found.subject.facts, "classes": found.subject.classes.folders}
    save_records(
        path,
        about,
        {suite: result.records for suite, result in found.results.items() if result.records},
    )
    return path


class Printer:
    """Prints results in the main process.

    A reader that has gone (`| head`) ends the command, unless results are also written to files.
    """

    def __init__(self, launch: EvalLaunch):
        self.writes_files = bool(launch.json or launch.csv or launch.predictions)

    def __call__(self, text: str) -> None:
        if not distributed.is_main():
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:
            if not self.writes_files:
                raise
            discard_output()


def _progress(name: str) -> Callable[[int, int], None]:
    return count_progress(name, enabled=distributed.is_main())
