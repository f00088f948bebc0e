"""One run: one method, one seed. `Trainer.train()` reads from top to bottom."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

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
from dad_fast.engine.cuda_graph import WARM_UP
from dad_fast.engine.diagnostics import attack_to_rounding, codes_changed
from dad_fast.engine.garbage import collections_between_steps
from dad_fast.engine.introduction import introduction
from dad_fast.engine.memory import enough_memory
from dad_fast.engine.meter import Meter, over_processes
from dad_fast.engine.notices import Advice
from dad_fast.engine.prefetch import feed
from dad_fast.engine.probe_features import FeatureLoader
from dad_fast.engine.schedule import learning_rate, total_epochs
from dad_fast.engine.step_timer import Clock
from dad_fast.engine.update import Update
from dad_fast.errors import DadFastError, Interrupted, NotFinite, Preempted
from dad_fast.evaluate.runner import Result, Suite, evaluate
from dad_fast.loggers.gpu import Gpu
from dad_fast.loggers.progress import TrainProgress
from dad_fast.loggers.run_log import RunLog
from dad_fast.loggers.sinks import open_sinks
from dad_fast.models.student import Student
from dad_fast.models.weights.files import write_safetensors

GO_ON = "go on with --resume auto"


class Trainer:
    """Trains `parts.student` into the folder `output`. Building one checks everything and writes nothing; then `start()`, `train()`.

    Of several processes each has one of its own, and all call the same methods at the same steps; only the first one writes.

    resume: "" starts at step 0; "auto" goes on from the newest sound checkpoint in `output`; a path goes on from that checkpoint.
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
        cfg = with_batch_sizes(cfg, distributed.world())
        self.cfg, self.parts, self.output, self.label = cfg, parts, output, label
        seed_generators(
            cfg.seed
        )  # again, after the student was built: a run draws the same whatever its initial weights took
        distributed.broadcast_(list(chain(parts.student.parameters(), parts.student.buffers())))
        self.update = Update(parts.student, cfg, parts.device)
        models = parts.student, parts.teacher, parts.discretizer
        self.step = make_step(cfg, *models, self.update)
        (self.learner,) = self.step.learners
        self.images_per_step = cfg.data.global_batch_size
        self.loader = self._loader()
        self.steps_per_epoch = self.loader.steps_per_epoch
        steps = round(total_epochs(cfg.schedule) * self.steps_per_epoch)
        self.total_steps = min(steps, cfg.max_steps) if cfg.max_steps else steps
        self.meter = Meter()
        self.next_step = 0
        self.best_top1 = -1.0
        self.validation_due = False  # a stop was asked for when it should have begun
        self.clock = Clock(parts.device)
        self.advice = Advice(cfg, parts, self.loader.name)
        self.met: set[str] = (
            set()
        )  # unreadable files in the batches of this process; its loader is ahead of them
        self.bad_images: set[str] = set()  # that any process has met
        self.gpu = (
            Gpu.open(parts.device.index or 0)
            if parts.device.type == "cuda" and distributed.is_main()
            else None
        )
        self.worst_streak = torch.zeros((), device=parts.device)
        self.checkpoints = CheckpointFolder(output / "checkpoints", cfg.checkpoint.keep)
        self.writer = Writer()
        self.notes: list[str] = []  # of what it goes on from, for `start` to say
        found = load_for_all(self.checkpoints, resume, self.notes.append) if resume else None
        if found is not None:
            restore(self, found, allow_config_change)
        self.metrics_offset = found.state["metrics_offset"] if found else 0

    def _loader(self) -> TrainLoader | FeatureLoader:
        cfg, parts, mine = (
            self.cfg,
            self.parts,
            self.cfg.data.batch_size * self.cfg.engine.grad_accum_steps,
        )
        rank, world, cuda = distributed.rank(), distributed.world(), parts.device.type == "cuda"
        if parts.probe is not None and parts.probe.features is not None:
            return FeatureLoader(parts.probe.features, mine, cfg.seed, rank, world, pin_memory=cuda)
        return train_loader(
            cfg.data.loader,
            parts.train,
            cfg.augment,
            parts.student.image_size,
            mine,
            seed=parts.stored.view_seed(cfg.seed),
            workers=cfg.data.workers,
            rank=rank,
            world=world,
            device=parts.device,
            cycle=parts.stored.cycle,
        )

    def start(self) -> None:
        """Open the logs, say what is about to happen, and make what the steps need before the first of them."""
        sinks = open_sinks(self.cfg.log_to, self.output) if distributed.is_main() else []
        self.log = RunLog(self.output, rank=distributed.rank(), sinks=sinks)
        self.log.truncate_to(self.metrics_offset)
        self.checkpoints.settle()
        for note in self.notes:
            self.log.say(note)
        cfg, parts = self.cfg, self.parts
        millions = sum(p.numel() for p in parts.student.parameters()) / 1e6
        others = distributed.world() - 1
        together = f" and {others} more process{'es' if others > 1 else ''}" if others else ""
        self.log.say(
            f"{self.label}: {cfg.method}, {parts.student.name} ({millions:.2f} M parameters) on {parts.device}{together}, "
            f"steps {self.next_step:,} to {self.total_steps:,} of {self.images_per_step} images"
        )
        for line in introduction(cfg, parts, self.loader):
            self.log.say(line, echo=False)
        parts.prepare(self.log.say)

    def train(self) -> dict[str, float]:
        """Runs to the end, or until a signal asks any process to stop: then the state is saved and Preempted or Interrupted raised."""
        distributed.set_timeout(distributed.LONG)  # until every process has warmed up
        with stop_requests() as stop, self._progress() as progress, collections_between_steps():
            try:
                self._steps(stop, progress)
            finally:
                self.writer.wait()
            distributed.set_timeout(
                distributed.LONG
            )  # what comes now, the first process may do alone
            distributed.barrier()  # none ends before the checkpoint is written
        return {
            "seconds": self.clock.total,
            "steps": self.next_step,
            "epochs": self.next_step / self.steps_per_epoch,
            "best_val_top1": self.best_top1,
            "bad_images": len(self.gathered_bad_images()),
            "failed_over": sum(distributed.all_gather_json(self.loader.failed_over)),
        }

    def _steps(self, stop: StopRequest, progress: TrainProgress) -> None:
        if self.validation_due:
            self._boundary(
                self.next_step == self.total_steps,
                epoch_ends=True,
                stopping=False,
                progress=progress,
            )
        batches, clock, vote, begun = (
            self._batches(),
            self.clock,
            distributed.Vote(),
            self.next_step,
        )
        clock.skip()
        while self.next_step < self.total_steps:
            first = self.next_step == begun  # nothing to save yet, and compilation may take minutes
            with ends_at_once(f"stopped in the first step; {GO_ON}") if first else nullcontext():
                batch = next(batches)
                if self.next_step == 0:  # a run that goes on has said it
                    self._check_signal(batch)
                if first:
                    clock.skip()

                lr = learning_rate(
                    self.next_step, self.steps_per_epoch, self.cfg.optim, self.cfg.schedule
                )
                with clock.step(), enough_memory(self.cfg, self.parts.device):
                    (scalars,) = self.step(batch, self.next_step, lr)
            self.meter.add(scalars)
            self.met.update(batch.replaced)
            self.worst_streak = torch.maximum(self.worst_streak, self.update.bad_in_a_row)
            self.next_step += 1
            progress.tick()
            self.writer.check()

            last, epoch_ends = (
                self.next_step == self.total_steps,
                self.next_step % self.steps_per_epoch == 0,
            )
            stopping = vote(
                stop.error
            )  # the same in all processes, as is everything that is decided below
            if self.next_step % self.cfg.log_every == 0 or last:
                self._log_window(lr, batch, progress)
            if last or epoch_ends or stopping or self._checkpoint_due():
                clock.count()
                self._boundary(last, epoch_ends, bool(stopping), progress)
                clock.skip()
                progress.pause()
            if stopping and not last:
                self._stop(stopping)
            if self.next_step == begun + WARM_UP + 1:  # compiled, captured, and everything met once
                distributed.barrier()
                distributed.set_timeout(self.cfg.engine.dist_timeout)
        vote.settle()

    def _batches(self) -> Iterator[Batch]:
        batches = self.loader.batches(self.next_step, self.total_steps)
        return feed(
            self.parts.join(batches, pin_memory=self.parts.device.type == "cuda"), self.parts.device
        )

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
        """Validation and checkpoint, whichever are due."""
        self._stop_if_not_finite()
        gc.collect()
        epoch, every = self.next_step // self.steps_per_epoch, self.cfg.eval.every_epochs
        best = False
        self.validation_due = not last and epoch_ends and every > 0 and epoch % every == 0
        if last or (self.validation_due and not stopping):
            self.validation_due = False
            try:
                result = self._validate(progress)
            except (Preempted, Interrupted) as stop:
                self.validation_due = True
                save(self, best=False)
                self._stop(type(stop))
            best = result.top1 > self.best_top1
            self.best_top1 = max(self.best_top1, result.top1)
            self.log.metrics(
                "val",
                step=self.next_step,
                epoch=epoch,
                top1=result.top1,
                nll=result.nll,
                ece=result.ece,
            )
        if (
            last
            or stopping
            or best
            or self._checkpoint_due()
            or (epoch_ends and not self.cfg.checkpoint.every_steps)
        ):
            save(self, best)

    def _validate(self, progress: TrainProgress) -> Result:
        return self.judge(
            self.evaluated,
            Suite(self.cfg.data.val_split, self.parts.val),
            progress.evaluating("validation"),
        )

    def _stop(self, kind: type[DadFastError]) -> NoReturn:
        """In all processes, once the state is written."""
        self.writer.wait()
        distributed.barrier()
        raise kind(
            f"stopped at step {self.next_step} of {self.total_steps}; saved in {self.output}, {GO_ON}"
        )

    def _checkpoint_due(self) -> bool:
        every = self.cfg.checkpoint.every_steps
        return bool(every) and self.next_step % every == 0

    def _log_window(self, lr: float, batch: Batch, progress: TrainProgress) -> None:
        self._stop_if_not_finite()
        values = self.meter.read()
        if values.get("applied") == 1.0:  # worth a word only where fp16 skipped a step
            del values["applied"]
        self.clock.count()
        window = self.clock.window()
        values |= codes_changed(self.step.generator, self.learner, batch)
        most = {"data_wait": window.waited / window.seconds}
        if self.parts.device.type == "cuda":
            most["gpu_memory"] = torch.cuda.max_memory_allocated(self.parts.device) / 2**30
        values = over_processes(values, most)
        bad_images = len(self.gathered_bad_images())
        self.advice.on_window(window, self.log.say)
        self.clock.skip()
        progress.update(values)
        gpu = {"gpu": self.gpu.sample()} if self.gpu else {}
        self.log.metrics(
            "train",
            step=self.next_step,
            epoch=self.next_step / self.steps_per_epoch,
            lr=lr,
            **values,
            img_per_s=window.steps * self.images_per_step / window.seconds,
            bad_images=bad_images,
            **gpu,
        )

    def gathered_bad_images(self) -> list[str]:
        """Unreadable files that any process has met so far. All processes call it."""
        for names in distributed.all_gather_json(sorted(self.met - self.bad_images)):
            self.bad_images.update(names)
        return sorted(self.bad_images)

    def _stop_if_not_finite(self) -> None:
        if self.worst_streak.item() > self.update.tolerated:
            self.worst_streak.zero_()  # whoever goes on from here with better settings begins to count anew
            self.update.bad_in_a_row.zero_()
            save(self, best=False)
            self.writer.wait()
            distributed.barrier()
            raise NotFinite(
                f"the loss or a gradient was not a number in a step before {self.next_step}; no such step was applied and the state is "
                f"kept in {self.checkpoints.root}; lower --lr, set --clip-grad, or look at the data and the weights"
            )

    @property
    def evaluated(self) -> Student:
        """The weights that evaluation uses: the EMA's when there is one."""
        return self.update.ema.module if self.update.ema is not None else self.parts.student

    def judge(
        self, model: nn.Module, suite: Suite, progress: Callable[[int, int], None] | None = None
    ) -> Result:
        """`model` on `suite`, with the student's view of an image (size, crop, filter) and the run's precision. Stops as `evaluate`."""
        student = self.parts.student
        with self.learner.autocast(), stop_requests():
            return evaluate(
                model,
                suite.source,
                name=suite.name,
                img_size=student.image_size,
                crop_pct=student.crop_pct,
                interpolation=student.interpolation,
                batch_size=self.cfg.eval.batch_size or self.cfg.data.batch_size,
                workers=self.cfg.data.workers,
                device=self.parts.device,
                corruption=suite.corruption,
                progress=progress,
                stopped=f"stopped while judging; the weights are saved in {self.output}, {GO_ON}",
            )

    def _check_signal(self, batch: Batch) -> None:
        ratio = attack_to_rounding(self.step.generator, self.learner, batch)
        if ratio is not None:
            self.log.metrics("attack", step=self.next_step, signal_to_rounding=ratio)
            self.advice.on_attack(ratio, self.log.say)

    def write_model(self, path: Path) -> None:
        """`model.safetensors`: the weights that evaluation uses, with what is needed to use them."""
        write_safetensors(path, *self.model_file())

    def model_file(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Tensors and metadata of `model.safetensors`."""
        tensors, metadata = self.evaluated.contents()
        return tensors, {
            **metadata,
            "dad_fast.method": self.cfg.method,
            "dad_fast.classes": self.parts.train.classes.to_json(),
            "dad_fast.ema": str(self.cfg.ema.model_ema).lower(),
        }
