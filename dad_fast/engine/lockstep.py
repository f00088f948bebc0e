"""The training loop: one run, or several in lockstep that learn from the same batches.

One loader and one generator make the inputs of a step for every student. The runs have equal
settings in all that this depends on. Each has its folder, log and checkpoints as if it were alone,
and on a CPU the same bits.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import NoReturn

import torch

from dad_fast.checkpoint.state import take, write
from dad_fast.checkpoint.writer import Writer
from dad_fast.data.loaders.loader import Batch
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.signals import StopRequest, ends_at_once, stop_requests
from dad_fast.engine.choices import fast_convolutions
from dad_fast.engine.cuda_graph import WARM_UP
from dad_fast.engine.generator import AttackGenerator
from dad_fast.engine.memory import collections_between_steps, enough_memory
from dad_fast.engine.prefetch import feed
from dad_fast.engine.step import TrainStep
from dad_fast.engine.trainer import RESUME_HINT, Trainer
from dad_fast.errors import DadFastError, Interrupted, NotFinite, Preempted
from dad_fast.loggers.progress import make_bar
from dad_fast.loggers.run_log import RunLog

STOPPED_AT_FIRST = f"stopped in the first step; {RESUME_HINT}"


class Lockstep:
    """Trains runs that all stand at one step. `train()` reads from top to bottom."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        """Create the loop. Runs whose steps differ are an error of the caller."""
        stands = {
            (one.next_step, one.total_steps, one.steps_per_epoch, one.images_per_step)
            for one in trainers
        }
        if len(stands) != 1:
            raise ValueError(f"runs at different steps cannot share their batches: {stands}")
        # Those that train; the others are in `failed`.
        self.trainers = list(trainers)
        self.failed: dict[Trainer, NotFinite] = {}
        self.logs: list[RunLog] = []
        # Makes the batches: images of the largest size.
        lead = max(trainers, key=lambda one: one.parts.student.image_size)
        self.lead = lead
        self.writer = Writer()
        # The newest step of which every run has a checkpoint.
        self.common = lead.next_step
        for trainer in trainers:
            self._join(trainer)
        self._assemble()

    @property
    def next_step(self) -> int:
        return self.trainers[0].next_step

    def _join(self, trainer: Trainer) -> None:
        """Let a run learn from the batches of the lead."""
        lead = self.lead
        if len(self.trainers) > 1:
            trainer.learner.random = trainer.random
        trainer.shared_by = max(trainer.shared_by, 1 + len(self.sharing_with(trainer)))
        if trainer is lead:
            return
        trainer.loader = lead.loader
        side, largest = trainer.parts.student.image_size, lead.parts.student.image_size
        layout, given = (one.settled.precision.channels_last for one in (trainer, lead))
        if (side, layout) != (largest, given):
            trainer.learner.see(side, torch.channels_last if layout else torch.contiguous_format)

    def _assemble(self) -> None:
        """Make the step of the runs that train."""
        lead, trainers = self.lead, self.trainers
        generator = lead.step.generator
        for trainer in trainers:
            trainer.clock.shared_by = len(trainers)
        if len(trainers) == 1 and trainers[0] is lead:
            self.step = lead.step
            return
        if isinstance(generator, AttackGenerator) and lead.parts.stored.adversarial is None:
            filters = [one.cfg.loss.filter for one in trainers]
            generator.filter = any(filters)
            for trainer, is_filtered in zip(trainers, filters, strict=True):
                trainer.learner.keeps_all = generator.filter and not is_filtered
        self.step = TrainStep(
            generator,
            [one.learner for one in trainers],
            num_micro_batches=lead.settled.engine.grad_accum_steps,
            tf32=lead.settled.precision.tf32,
            cuda_graphs=lead.settled.engine.cuda_graphs,
        )

    def start(self) -> None:
        """Open the logs, log the run summaries, and prepare what the steps need."""
        for trainer in self.trainers:
            with trainer.own_random():
                trainer.start()
            self.logs.append(trainer.log)
            for line in self._sharing(trainer):
                trainer.log.say(line)
        # Opening a log has taken the warnings from those before.
        for log in self.logs[:-1]:
            log.also_receive_warnings()

    def close_sinks(self) -> None:
        """End the log sinks of the runs, also after a failure."""
        for log in self.logs:
            log.close_sinks()

    def sharing_with(self, trainer: Trainer) -> list[str]:
        """Return the labels of the runs that learn from the same batches from here on."""
        if self.next_step >= self.lead.total_steps:
            return []
        return [one.label for one in self.trainers if one is not trainer]

    def _sharing(self, trainer: Trainer) -> list[str]:
        others = self.sharing_with(trainer)
        if not others:
            return []
        lines = [f"  shares   its batches with {', '.join(others)}"]
        side, largest = (one.parts.student.image_size for one in (trainer, self.lead))
        if side != largest:
            lines.append(
                f"  images   made at {largest} px for all and resized to {side} px on the device: "
                "this run differs slightly from one of its own"
            )
        return lines

    def train(self) -> None:
        """Train to the last step.

        A run of several is left out, in `failed`, when too many of its steps in a row were skipped;
        the last one raises NotFinite. Raises Preempted or Interrupted, after saving, when a signal
        asks any process to stop.
        """
        # Long until every process has warmed up; `_steps` shortens it.
        distributed.set_timeout(distributed.LONG)
        bar = make_bar()
        with ExitStack() as stack:
            stop = stack.enter_context(stop_requests())
            for trainer in self.trainers:
                stack.enter_context(trainer.make_progress(bar))
            stack.enter_context(collections_between_steps())
            try:
                with fast_convolutions(self.lead.parts.device):
                    self._steps(stop)
            finally:
                self.writer.wait()
            # Long again: rank 0 may evaluate and write the report alone.
            distributed.set_timeout(distributed.LONG)
            # No process ends before the checkpoint is written.
            distributed.barrier()

    def _steps(self, stop: StopRequest) -> None:
        if delayed := [one for one in self.trainers if one.validation_due]:
            self._boundary(delayed, stopping=False)

        total, lead = self.lead.total_steps, self.lead
        batches = self._batches()
        vote = distributed.Vote()
        first_step = self.next_step
        self._skip()
        while self.next_step < total:
            is_first = self.next_step == first_step
            # Nothing to save yet, and compilation may take minutes: a signal ends it at once.
            with ends_at_once(STOPPED_AT_FIRST) if is_first else nullcontext():
                batch = next(batches)
                if self.next_step == 0:
                    self._log_attack(batch)
                if is_first:
                    self._skip()
                started = time.monotonic()
                self._step(batch)
            if is_first:
                for trainer in self.trainers:
                    trainer.progress.note = f"first step {time.monotonic() - started:.1f} s"
            self.writer.check()

            is_last = self.next_step == total
            # The vote is the same in all processes, and so is every decision below.
            stopping = vote(stop.error)
            self._log(batch)
            at = self.trainers[0]
            due = [one for one in self.trainers if one.checkpoint_due()]
            if is_last or at.epoch_ends() or stopping or due:
                for trainer in self.trainers:
                    trainer.clock.count()
                self._boundary(self.trainers, bool(stopping))
                self._skip()
                for trainer in self.trainers:
                    trainer.progress.pause()
            if stopping and not is_last:
                self._stop(stopping)

            # By now every process has compiled and captured.
            if self.next_step == first_step + WARM_UP + 1:
                if self.step.graphs is not None and self.step.graphs.captured:
                    lead.log.say("the step is captured in CUDA graphs", echo=False)
                distributed.barrier()
                distributed.set_timeout(lead.cfg.engine.dist_timeout)
        vote.settle()

    def _batches(self) -> Iterator[Batch]:
        parts = self.lead.parts
        batches = self.lead.loader.batches(self.next_step, self.lead.total_steps)
        joined = parts.join(batches, pin_memory=parts.device.type == "cuda")
        return feed(joined, parts.device)

    def _step(self, batch: Batch) -> None:
        """Make one step and count it."""
        rates = [one.learning_rate(one.next_step) for one in self.trainers]
        with ExitStack() as stack:
            for trainer in self.trainers:
                stack.enter_context(trainer.clock.step())
            stack.enter_context(enough_memory(self.lead.settled, self.lead.parts.device))
            results = self.step(batch, self.next_step, rates)
        for trainer, scalars in zip(self.trainers, results, strict=True):
            trainer.count(batch, scalars)

    def _skip(self) -> None:
        """Exclude the time since the last count from all times of training."""
        for trainer in self.trainers:
            trainer.clock.skip()

    def _log_attack(self, batch: Batch) -> None:
        for trainer in self.trainers:
            with trainer.own_random():
                trainer.log_attack(batch)

    def _log(self, batch: Batch) -> None:
        """Log the windows that end with this step; else update the progress where that is due."""
        due = [one for one in self.trainers if one.log_due()]
        for trainer in self.trainers:
            if trainer not in due and trainer.progress.is_due():
                trainer.progress.update(trainer.monitor.peek())
        if not due:
            return
        self._leave_out_non_finite(due)
        reads = {one: one.monitor.read() for one in self.trainers if one in due}
        for trainer in self.trainers:
            trainer.clock.count()
        known: dict[str, float] = {}
        for trainer, read in reads.items():
            with trainer.own_random():
                trainer.log_window(read, batch, known)
        self._skip()

    def _boundary(self, trainers: Sequence[Trainer], stopping: bool) -> None:
        """Validate and save, whichever is due."""
        self._leave_out_non_finite(trainers)
        trainers = [one for one in trainers if one not in self.failed]
        gc.collect()
        best: dict[Trainer, bool] = {}
        for number, trainer in enumerate(trainers):
            try:
                with trainer.own_random():
                    best[trainer] = trainer.validate_if_due(stopping)
            except (Preempted, Interrupted) as stop:
                for late in trainers[number:]:
                    late.delay_validation()
                self._save({one: best.get(one, False) for one in self.trainers})
                self._stop(type(stop))
        self._save({one: found for one, found in best.items() if one.save_due(stopping, found)})

    def _save(self, best: Mapping[Trainer, bool]) -> None:
        """Save the keys of `best`; a thread writes while training continues.

        best: True for a student that is the best of its run so far.
        """
        if not best:
            return
        waited = self.writer.wait()
        saves = []
        for trainer, is_best in best.items():
            trainer.monitor.advice.on_write(waited, trainer.log.say)
            with trainer.own_random():
                saves.append(take(trainer, is_best))
        if all(one in best for one in self.trainers):
            self.common = self.next_step
        write([one for one in saves if one is not None], self.writer, self.common)

    def _leave_out_non_finite(self, trainers: Sequence[Trainer]) -> None:
        """Save the runs whose loss is not finite and train the others on.

        Raises NotFinite if no other is left.
        """
        bad = [one for one in trainers if not one.is_finite()]
        if not bad:
            return
        for trainer in self.trainers:
            trainer.clock.count()
        self._save(dict.fromkeys(bad, False))
        self.writer.wait()
        several = len(self.trainers) + len(self.failed) > 1
        for trainer in bad:
            error = trainer.not_finite()
            self.failed[trainer] = NotFinite(f"{trainer.label}: {error}") if several else error
        self.trainers = [one for one in self.trainers if one not in self.failed]
        if not self.trainers:
            raise self.failed[bad[0]]
        for trainer in bad:
            trainer.log.say(f"stopped: {self.failed[trainer]}; the other runs train on")
        self._assemble()
        self._skip()

    def _stop(self, kind: type[DadFastError]) -> NoReturn:
        """Raise `kind` in all processes, once the state is written."""
        self.writer.wait()
        distributed.barrier()
        lead, others = self.trainers[0], len(self.trainers) - 1
        more = f" and {others} more folder{'s' if others > 1 else ''}" if others else ""
        where = f"step {lead.next_step} of {lead.total_steps}"
        raise kind(f"stopped at {where}; saved in {lead.output}{more}, {RESUME_HINT}")
