"""One run: one method, one student, one seed; its files, scores and state. lockstep.py trains it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dad_fast.checkpoint.folder import CheckpointFolder
from dad_fast.checkpoint.state import load_for_all, restore, seed_generators
from dad_fast.config.schema import Config
from dad_fast.config.variants import student_seed, with_batch_sizes
from dad_fast.data.loaders.choose import train_loader
from dad_fast.data.loaders.loader import Batch, TrainLoader
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.build import Components, make_step
from dad_fast.engine.diagnostics import cause_of_non_finite
from dad_fast.engine.evaluator import Evaluator
from dad_fast.engine.monitor import Monitor
from dad_fast.engine.notices import details, ema_lag, opening, run_choices
from dad_fast.engine.own_random import OwnRandom
from dad_fast.engine.probe.features import FeatureLoader
from dad_fast.engine.schedule import make_schedule, total_steps
from dad_fast.engine.step_timer import Window
from dad_fast.engine.update import Update
from dad_fast.errors import NotFinite
from dad_fast.evaluation.runner import Result, Suite
from dad_fast.evaluation.show import non_finite_note
from dad_fast.loggers.progress import TrainProgress
from dad_fast.loggers.run_log import RunLog
from dad_fast.loggers.sinks import open_sinks
from dad_fast.models.float32 import float32_math
from dad_fast.models.probe import probe_views
from dad_fast.models.student import Student
from dad_fast.models.weights.files import write_safetensors

RESUME_HINT = "resume with --resume auto"
STOPPED_IN_EVALUATION = "stopped while evaluating; the weights are saved in"


def checkpoints_of(output: Path, cfg: Config) -> CheckpointFolder:
    """Return the checkpoints of the run in the folder `output`."""
    return CheckpointFolder(output / "checkpoints", cfg.checkpoint.keep)


class Trainer:
    """Owns what is of one run while `parts.student` is trained into the folder `output`.

    Creating one checks everything and writes nothing; then `Lockstep` trains it, alone or with
    others. With several processes each has its own trainer, all call the same methods at the same
    steps, and only the first one writes.
    """

    def __init__(
        self,
        cfg: Config,
        parts: Components,
        output: Path,
        label: str,
        resume: str = "",
        allow_config_change: bool = False,
    ):
        """Create a trainer.

        resume: "" starts at step 0; "auto" resumes from the newest sound checkpoint in `output`; a
        path resumes from that checkpoint. Raises UsageError for a checkpoint of another run,
        DataError for one that cannot be read.
        """
        cfg = with_batch_sizes(cfg, distributed.world())
        self.cfg = cfg
        self.parts = parts
        self.output = output
        self.label = label
        device, student = parts.device, parts.student

        # Again: the draws of a run must not depend on those of its student's initial weights.
        seed_generators(student_seed(cfg))
        distributed.broadcast_(list(chain(student.parameters(), student.buffers())))
        # `self.cfg` keeps "auto", for the files of the run.
        self.settled = parts.choices.settled(cfg)
        self.update = Update(student, self.settled, device)
        models = student, parts.teacher, parts.discretizer
        self.step = make_step(self.settled, *models, self.update, parts.kernels)
        (self.learner,) = self.step.learners

        self.images_per_step = cfg.data.global_batch_size
        self.loader = self._loader()
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.learning_rate = make_schedule(self.steps_per_epoch, cfg.optim, cfg.schedule)
        self.total_steps = total_steps(cfg, self.steps_per_epoch)

        self.next_step = 0
        self.best_top1 = -1.0
        # Epochs trained at that validation; 0 before the first.
        self.best_epoch = 0.0
        # True if a stop was requested where a validation was due.
        self.validation_due = False
        self.worst_streak = torch.zeros((), device=device)
        self.last_batch: Batch | None = None
        # The most runs that it shared its batches with, itself included.
        self.shared_by = 1

        self.choices = run_choices(cfg, parts, self.loader, self.step.graphs is not None)
        self.monitor = Monitor(cfg, parts, self.step, self.loader.name)
        self.clock = self.monitor.clock
        stopped = f"{STOPPED_IN_EVALUATION} {output}, {RESUME_HINT}"
        self.evaluate = Evaluator(cfg, parts, self.learner.autocast, stopped)

        self.checkpoints = checkpoints_of(output, cfg)
        # About the checkpoint; `start` logs them.
        self.notes: list[str] = []
        self.metrics_offset = 0
        found = load_for_all(self.checkpoints, resume, self.notes.append) if resume else None
        if found is not None:
            restore(self, found, allow_config_change)
            self.metrics_offset = found.state["metrics_offset"]
        # Used where other runs are trained in between.
        self.random = OwnRandom(device)

    def _loader(self) -> TrainLoader | FeatureLoader:
        cfg, parts = self.cfg, self.parts
        batch_size = cfg.data.batch_size * cfg.engine.grad_accum_steps
        rank, world = distributed.rank(), distributed.world()
        features = parts.probe.features if parts.probe is not None else None
        if features is not None:
            cuda = parts.device.type == "cuda"
            return FeatureLoader(features, batch_size, cfg.seed, rank, world, pin_memory=cuda)
        return train_loader(
            cfg.data.loader,
            parts.train,
            probe_views(cfg.augment, parts.student),
            parts.student.image_size,
            batch_size,
            seed=parts.stored.view_seed(cfg.seed),
            workers=cfg.data.workers,
            rank=rank,
            world=world,
            device=parts.device,
            cycle=parts.stored.cycle,
        )

    def start(self) -> None:
        """Open the logs, log the run summary, and prepare what the steps need."""
        sinks = open_sinks(self.cfg, self.output, self.next_step) if distributed.is_main() else []
        self.log = RunLog(self.output, rank=distributed.rank(), sinks=sinks)
        # First, so that no checkpoint is left of the lines that are dropped.
        self.checkpoints.settle()
        self.log.truncate_to(self.metrics_offset)
        for note in self.notes:
            self.log.say(note)

        steps = f"{self.next_step:,} to {self.total_steps:,} of {self.images_per_step} images"
        steps += f", {self.steps_per_epoch:,} an epoch"
        if self.next_step >= self.total_steps:
            steps = f"{self.next_step:,} are done, as many as asked for; the evaluation is left"
        for line in opening(self.label, self.cfg, self.parts, self.choices, steps):
            self.log.say(line)
        for line in details(self.cfg, self.parts, self.choices):
            self.log.say(line, echo=False)
        if warning := ema_lag(self.cfg.ema, self.total_steps):
            self.log.say(warning)
        self.log.say(f"  details  {self.output / 'train.log'}: models, speed settings and reasons")
        with float32_math(tf32=self.cfg.precision.tf32):
            self.parts.prepare(self.log.say)

    def summary(self) -> dict[str, float]:
        """Return the summary of the run for its record. A collective."""
        shared = {"shared_by": self.shared_by} if self.shared_by > 1 else {}
        return {
            "seconds": self.clock.total,
            **shared,
            "steps": self.next_step,
            "epochs": self.next_step / self.steps_per_epoch,
            "best_val_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            "bad_images": len(self.monitor.gathered_bad_images()),
            "failed_over": sum(distributed.all_gather_json(self.loader.failed_over)),
        }

    def own_random(self) -> AbstractContextManager[None]:
        """Draw from the run's own random generators inside the block."""
        return self.learner.own_random()

    def make_progress(self, bar: Any) -> TrainProgress:
        """Create the run's line of `bar`, or its plain lines if that is None."""
        self.progress = TrainProgress(
            self.total_steps,
            self.images_per_step,
            self.steps_per_epoch,
            self.label,
            self.log,
            start_step=self.next_step,
            bar=bar,
        )
        return self.progress

    def count(self, batch: Batch, scalars: dict[str, Tensor]) -> None:
        """Count a step that was made with `batch`."""
        self.monitor.add(batch, scalars)
        self.last_batch = batch
        self.worst_streak = torch.maximum(self.worst_streak, self.update.bad_in_a_row)
        self.next_step += 1
        self.progress.tick()

    def is_last(self) -> bool:
        return self.next_step == self.total_steps

    def epoch_ends(self) -> bool:
        return self.next_step % self.steps_per_epoch == 0

    def checkpoint_due(self) -> bool:
        every = self.cfg.checkpoint.every_steps
        return bool(every) and self.next_step % every == 0

    def log_due(self) -> bool:
        return self.next_step % self.cfg.log_every == 0 or self.is_last()

    def validate_if_due(self, stopping: bool) -> bool:
        """Validate at a boundary. Returns True if the student is the best so far.

        Raises Preempted or Interrupted when a signal asks any process to stop.
        """
        if self.epoch_ends() and (means := self.monitor.peek()):
            self.progress.update(means)
        last = self.is_last()
        self.validation_due = not last and self._epoch_is_validated()
        if not last and (stopping or not self.validation_due):
            if self.epoch_ends():
                self.progress.end_epoch()
            return False
        result = self._validate()
        best = result.top1 > self.best_top1
        if best:
            self.best_top1 = result.top1
            self.best_epoch = self.next_step / self.steps_per_epoch
        self.progress.show_validation(result.top1, self.best_top1)
        return best

    def save_due(self, stopping: bool, best: bool) -> bool:
        by_epoch = self.epoch_ends() and not self.cfg.checkpoint.every_steps
        return self.is_last() or stopping or best or by_epoch or self.checkpoint_due()

    def delay_validation(self) -> None:
        """Leave the validation of this boundary to the resumed run."""
        self.validation_due = self.is_last() or self._epoch_is_validated()

    def _epoch_is_validated(self) -> bool:
        every = self.cfg.eval.every_epochs
        epoch = self.next_step // self.steps_per_epoch
        return self.epoch_ends() and every > 0 and epoch % every == 0

    def _validate(self) -> Result:
        """Evaluate on the validation split and log the scores."""
        suite = Suite(self.cfg.data.val_split, self.parts.val)
        self.validation_due = False
        show = self.progress.evaluating("validation")
        result = self.evaluate(self.evaluated, suite, show)
        self.log.metrics(
            "val",
            step=self.next_step,
            epoch=self.next_step // self.steps_per_epoch,
            top1=result.top1,
            nll=result.nll,
            ece=result.ece,
        )
        if note := non_finite_note(result):
            self.log.say(note)
        return result

    def log_attack(self, batch: Batch) -> None:
        """Log what attack and discretizer change on a few images of the first batch."""
        values = self.monitor.attack(batch, self.log.say)
        if values:
            self.log.metrics("attack", step=self.next_step, **values)
        fidelity = self.monitor.fidelity(batch, self.log.say)
        if fidelity:
            self.log.metrics("discretizer", step=self.next_step, **fidelity)

    def log_window(
        self, read: tuple[dict[str, float], Window], batch: Batch, known: dict[str, float]
    ) -> None:
        """Log the steps since the last window. The arguments are those of `Monitor.window`."""
        values, others = self.monitor.window(read, batch, self.log.say, known)
        self.progress.update(values)
        self.log.metrics(
            "train",
            step=self.next_step,
            epoch=self.next_step / self.steps_per_epoch,
            lr=self.learning_rate(self.next_step - 1),
            **values,
            **others,
        )

    def is_finite(self) -> bool:
        """Return False if too many steps in a row were skipped. Waits for the device."""
        finite: bool = self.worst_streak.item() <= self.update.tolerated
        if not finite:
            # Reset, so that a resumed run starts from zero.
            self.worst_streak.zero_()
            self.update.bad_in_a_row.zero_()
        return finite

    def not_finite(self) -> NotFinite:
        """Return the error of a run that is not finite, whose state is saved. A collective."""
        cause = cause_of_non_finite(self.step.generator, self.learner, self.last_batch)
        return NotFinite(
            f"the loss or a gradient was not a number in a step before {self.next_step}; such "
            f"steps were skipped and the state is saved in {self.checkpoints.root}; {cause}"
        )

    @property
    def evaluated(self) -> Student:
        """The student to evaluate: its EMA if there is one."""
        return self.update.ema.module if self.update.ema is not None else self.parts.student

    def write_model(self, path: Path) -> None:
        """Write `model.safetensors`: the weights to evaluate and their metadata."""
        write_safetensors(path, *self.model_file())

    def model_file(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return tensors and metadata of `model.safetensors`."""
        tensors, metadata = self.evaluated.contents()
        return tensors, {
            **metadata,
            "dad_fast.method": self.cfg.method,
            "dad_fast.classes": self.parts.train.classes.to_json(),
            "dad_fast.ema": str(self.cfg.ema.model_ema).lower(),
        }
