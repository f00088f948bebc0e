"""One run: one method, one seed. `Trainer.train()` reads from top to bottom."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch

from dad_fast.checkpoint.folder import CheckpointFolder
from dad_fast.checkpoint.state import load_for_all, restore, save, seed_generators
from dad_fast.checkpoint.writer import Writer
from dad_fast.config.schema import Config
from dad_fast.config.variants import with_batch_sizes
from dad_fast.data.loaders.choose import train_loader
from dad_fast.data.loaders.loader import Batch, TrainLoader
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.signals import StopRequest, ends_at_once, stop_requests
from dad_fast.engine.build import Components, make_step
from dad_fast.engine.choices import fast_convolutions
from dad_fast.engine.cuda_graph import WARM_UP
from dad_fast.engine.diagnostics import cause_of_non_finite
from dad_fast.engine.evaluator import Evaluator
from dad_fast.engine.memory import collections_between_steps, enough_memory
from dad_fast.engine.monitor import Monitor
from dad_fast.engine.notices import details, ema_lag, opening, run_choices
from dad_fast.engine.prefetch import feed
from dad_fast.engine.probe.features import FeatureLoader
from dad_fast.engine.schedule import make_schedule, total_steps
from dad_fast.engine.update import Update
from dad_fast.errors import DadFastError, Interrupted, NotFinite, Preempted
from dad_fast.evaluate.runner import Result, Suite
from dad_fast.evaluate.show import non_finite_note
from dad_fast.loggers.progress import TrainProgress
from dad_fast.loggers.run_log import RunLog
from dad_fast.loggers.sinks import open_sinks
from dad_fast.models.float32 import float32_math
from dad_fast.models.probe import probe_views
from dad_fast.models.student import Student
from dad_fast.models.weights.files import write_safetensors

RESUME_HINT = "resume with --resume auto"
STOPPED_AT_FIRST = f"stopped in the first step; {RESUME_HINT}"
STOPPED_IN_EVALUATION = "stopped while evaluating; the weights are saved in"


class Trainer:
    """Trains `parts.student` into the folder `output`.

    Creating one checks everything and writes nothing; then call `start()` and `train()`. With
    several processes each has its own trainer, all call the same methods at the same steps, and
    only the first one writes.
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
        seed_generators(cfg.seed)
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

        self.choices = run_choices(cfg, parts, self.loader, self.step.graphs is not None)
        self.monitor = Monitor(cfg, parts, self.step, self.loader.name)
        self.clock = self.monitor.clock
        stopped = f"{STOPPED_IN_EVALUATION} {output}, {RESUME_HINT}"
        self.evaluate = Evaluator(cfg, parts, self.learner.autocast, stopped)

        self.checkpoints = CheckpointFolder(output / "checkpoints", cfg.checkpoint.keep)
        self.writer = Writer()
        # About the checkpoint; `start` logs them.
        self.notes: list[str] = []
        self.metrics_offset = 0
        found = load_for_all(self.checkpoints, resume, self.notes.append) if resume else None
        if found is not None:
            restore(self, found, allow_config_change)
            self.metrics_offset = found.state["metrics_offset"]

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
        self.log.truncate_to(self.metrics_offset)
        self.checkpoints.settle()
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

    def train(self) -> dict[str, float]:
        """Train to the last step.

        Returns the summary of the run. Raises Preempted or Interrupted, after saving, when a signal
        asks any process to stop, and NotFinite when too many steps in a row were skipped.
        """
        # Long until every process has warmed up; `_steps` shortens it.
        distributed.set_timeout(distributed.LONG)
        with stop_requests() as stop, self._progress() as progress, collections_between_steps():
            try:
                with fast_convolutions(self.parts.device):
                    self._steps(stop, progress)
            finally:
                self.writer.wait()
            # Long again: rank 0 may evaluate and write the report alone.
            distributed.set_timeout(distributed.LONG)
            # No process ends before the checkpoint is written.
            distributed.barrier()
        return self._summary()

    def _steps(self, stop: StopRequest, progress: TrainProgress) -> None:
        if self.validation_due:
            is_last = self.next_step == self.total_steps
            self._boundary(is_last, epoch_ends=True, stopping=False, progress=progress)

        batches = self._batches()
        vote = distributed.Vote()
        first_step = self.next_step
        self.clock.skip()
        while self.next_step < self.total_steps:
            is_first = self.next_step == first_step
            # Nothing to save yet, and compilation may take minutes: a signal ends it at once.
            with ends_at_once(STOPPED_AT_FIRST) if is_first else nullcontext():
                batch = next(batches)
                if self.next_step == 0:
                    self._log_attack(batch)
                if is_first:
                    self.clock.skip()
                started = time.monotonic()
                lr = self._step(batch)
            if is_first:
                progress.note = f"first step {time.monotonic() - started:.1f} s"
            progress.tick()
            self.writer.check()

            is_last = self.next_step == self.total_steps
            epoch_ends = self.next_step % self.steps_per_epoch == 0
            # The vote is the same in all processes, and so is every decision below.
            stopping = vote(stop.error)
            if self.next_step % self.cfg.log_every == 0 or is_last:
                self._log_window(lr, batch, progress)
            elif progress.is_due():
                progress.update(self.monitor.peek())
            if is_last or epoch_ends or stopping or self._checkpoint_due():
                self.clock.count()
                self._boundary(is_last, epoch_ends, bool(stopping), progress)
                self.clock.skip()
                progress.pause()
            if stopping and not is_last:
                self._stop(stopping)

            # By now every process has compiled and captured.
            if self.next_step == first_step + WARM_UP + 1:
                if self.step.graphs is not None and self.step.graphs.captured:
                    self.log.say("the step is captured in CUDA graphs", echo=False)
                distributed.barrier()
                distributed.set_timeout(self.cfg.engine.dist_timeout)
        vote.settle()

    def _step(self, batch: Batch) -> float:
        """Make one step and count it. Returns its learning rate."""
        lr = self.learning_rate(self.next_step)
        with self.clock.step(), enough_memory(self.settled, self.parts.device):
            (scalars,) = self.step(batch, self.next_step, lr)
        self.monitor.add(batch, scalars)
        self.last_batch = batch
        self.worst_streak = torch.maximum(self.worst_streak, self.update.bad_in_a_row)
        self.next_step += 1
        return lr

    def _summary(self) -> dict[str, float]:
        return {
            "seconds": self.clock.total,
            "steps": self.next_step,
            "epochs": self.next_step / self.steps_per_epoch,
            "best_val_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            "bad_images": len(self.monitor.gathered_bad_images()),
            "failed_over": sum(distributed.all_gather_json(self.loader.failed_over)),
        }

    def _batches(self) -> Iterator[Batch]:
        device = self.parts.device
        batches = self.loader.batches(self.next_step, self.total_steps)
        joined = self.parts.join(batches, pin_memory=device.type == "cuda")
        return feed(joined, device)

    def _progress(self) -> TrainProgress:
        return TrainProgress(
            self.total_steps,
            self.images_per_step,
            self.steps_per_epoch,
            self.label,
            self.log,
            start_step=self.next_step,
        )

    def _boundary(
        self, last: bool, epoch_ends: bool, stopping: bool, progress: TrainProgress
    ) -> None:
        """Validate and save, whichever is due."""
        self._stop_if_not_finite()
        gc.collect()
        if epoch_ends and (means := self.monitor.peek()):
            progress.update(means)
        epoch = self.next_step // self.steps_per_epoch
        every = self.cfg.eval.every_epochs
        best = False
        self.validation_due = not last and epoch_ends and every > 0 and epoch % every == 0
        if last or (self.validation_due and not stopping):
            result = self._validate(progress)
            best = result.top1 > self.best_top1
            if best:
                self.best_top1 = result.top1
                self.best_epoch = self.next_step / self.steps_per_epoch
            progress.show_validation(result.top1, self.best_top1)
        elif epoch_ends:
            progress.end_epoch()
        by_epoch = epoch_ends and not self.cfg.checkpoint.every_steps
        if last or stopping or best or by_epoch or self._checkpoint_due():
            save(self, best)

    def _validate(self, progress: TrainProgress) -> Result:
        """Evaluate on the validation split and log the scores.

        Raises Preempted or Interrupted, after saving, when a signal asks any process to stop.
        """
        suite = Suite(self.cfg.data.val_split, self.parts.val)
        self.validation_due = False
        try:
            result = self.evaluate(self.evaluated, suite, progress.evaluating("validation"))
        except (Preempted, Interrupted) as stop:
            self.validation_due = True
            save(self, best=False)
            self._stop(type(stop))
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

    def _stop(self, kind: type[DadFastError]) -> NoReturn:
        """Raise `kind` in all processes, once the state is written."""
        self.writer.wait()
        distributed.barrier()
        where = f"step {self.next_step} of {self.total_steps}"
        raise kind(f"stopped at {where}; saved in {self.output}, {RESUME_HINT}")

    def _checkpoint_due(self) -> bool:
        every = self.cfg.checkpoint.every_steps
        return bool(every) and self.next_step % every == 0

    def _log_attack(self, batch: Batch) -> None:
        """Log what attack and discretizer change on a few images of the first batch."""
        values = self.monitor.attack(batch, self.log.say)
        if values:
            self.log.metrics("attack", step=self.next_step, **values)
        fidelity = self.monitor.fidelity(batch, self.log.say)
        if fidelity:
            self.log.metrics("discretizer", step=self.next_step, **fidelity)

    def _log_window(self, lr: float, batch: Batch, progress: TrainProgress) -> None:
        self._stop_if_not_finite()
        values, others = self.monitor.window(batch, self.log.say)
        progress.update(values)
        self.log.metrics(
            "train",
            step=self.next_step,
            epoch=self.next_step / self.steps_per_epoch,
            lr=lr,
            **values,
            **others,
        )

    def _stop_if_not_finite(self) -> None:
        if self.worst_streak.item() > self.update.tolerated:
            # Reset, so that a resumed run starts from zero.
            self.worst_streak.zero_()
            self.update.bad_in_a_row.zero_()
            save(self, best=False)
            self.writer.wait()
            cause = cause_of_non_finite(self.step.generator, self.learner, self.last_batch)
            raise NotFinite(
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
