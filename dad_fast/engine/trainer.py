"""One run: one method, one seed. `Trainer.train()` reads from top to bottom."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import differences, from_toml, to_toml
from ..config.schema import Config
from ..data.loader import TrainLoader
from ..errors import NotFinite, UsageError
from ..evaluate.runner import Result, evaluate
from ..models.student import Student, save_student
from ..observe.progress import TrainProgress
from ..observe.runlog import RunLog
from .build import Parts
from .checkpoint import CheckpointFolder, flatten_optimizer, generator_tensors, restore_generators, restore_optimizer
from .meter import Meter
from .schedule import learning_rate, total_epochs
from .signals import stop_requests
from .step import TrainStep
from .update import Update


class Trainer:
    """Trains `parts.student` into the folder `output`; build it, then call `train()`.

    resume: "" starts at step 0; "auto" goes on from the newest sound checkpoint in `output`; a path goes on from that checkpoint.
    """

    def __init__(self, cfg: Config, parts: Parts, output: Path, resume: str = "", allow_config_change: bool = False):
        self.cfg, self.parts, self.output = cfg, parts, output
        random.seed(cfg.seed)
        np.random.seed(cfg.seed % 2**32)
        torch.manual_seed(cfg.seed)  # again, after the student was built: a run draws the same whatever its initial weights took
        self.update = Update(parts.student, cfg, parts.device)
        self.step = TrainStep(cfg, parts.student, parts.teacher, parts.discretizer, self.update)
        self.loader = TrainLoader(
            parts.train, cfg.augment, parts.student.image_size, cfg.data.batch_size, seed=cfg.seed, workers=cfg.data.workers,
            pin_memory=parts.device.type == "cuda",
        )  # fmt: skip
        self.steps_per_epoch = self.loader.steps_per_epoch
        steps = round(total_epochs(cfg.schedule) * self.steps_per_epoch)
        self.total_steps = min(steps, cfg.max_steps) if cfg.max_steps else steps
        self.meter = Meter()
        self.next_step = 0
        self.best_top1 = -1.0
        self.train_seconds = 0.0
        self.worst_streak = torch.zeros((), device=parts.device)
        self.checkpoints = CheckpointFolder(output / "checkpoints", cfg.checkpoint.keep)
        offset = self._restore(resume, allow_config_change) if resume else 0
        self.log = RunLog(output, offset=offset)

    def train(self) -> dict[str, float]:
        """Runs to the end, or until a signal asks to stop (state saved, `Preempted` or `Interrupted` raised)."""
        batches = iter(self.loader.batches(self.next_step, self.total_steps))
        with stop_requests() as stop, TrainProgress(self.total_steps, self.next_step, self.cfg.data.batch_size, self.log) as progress:
            window_start, waited = time.perf_counter(), 0.0
            while self.next_step < self.total_steps:
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked

                lr = learning_rate(self.next_step, self.steps_per_epoch, self.cfg.optim, self.cfg.schedule)
                scalars = self.step(batch, self.next_step, lr)
                self.meter.add(scalars)
                self.worst_streak = torch.maximum(self.worst_streak, self.update.bad_in_a_row)
                self.next_step += 1
                progress.tick(self.next_step)

                last, epoch_ends = self.next_step == self.total_steps, self.next_step % self.steps_per_epoch == 0
                if self.next_step % self.cfg.log_every == 0 or last:
                    elapsed = time.perf_counter() - window_start
                    self.train_seconds += elapsed
                    self._log_window(lr, elapsed, waited, batch, progress)
                    window_start, waited = time.perf_counter(), 0.0
                if last or epoch_ends or stop.error or self._checkpoint_due():
                    self.train_seconds += time.perf_counter() - window_start
                    self._boundary(last, epoch_ends, bool(stop.error))
                    window_start = time.perf_counter()
                if stop.error:
                    raise stop.error(f"stopped at step {self.next_step} of {self.total_steps}; saved in {self.output}, go on with --resume auto")
        return {"train_seconds": self.train_seconds, "steps": self.next_step, "epochs": self.next_step / self.steps_per_epoch, "best_top1": self.best_top1}

    def _boundary(self, last: bool, epoch_ends: bool, stopping: bool) -> None:
        """Validation and checkpoint, whichever are due."""
        self._stop_if_not_finite()
        epoch, every = self.next_step // self.steps_per_epoch, self.cfg.eval.every_epochs
        best = False
        if not stopping and (last or (epoch_ends and every and epoch % every == 0)):
            result = self.validate()
            best = result.top1 > self.best_top1
            self.best_top1 = max(self.best_top1, result.top1)
            self.log.metrics({"step": self.next_step, "val_top1": result.top1, "val_nll": result.nll, "val_ece": result.ece})
            self.log.say(f"step {self.next_step}: validation top-1 {result.top1:.2f} %{' (best so far)' if best else ''}")
        if last or stopping or best or self._checkpoint_due() or (epoch_ends and not self.cfg.checkpoint.every_steps):
            self._save(best)

    def _checkpoint_due(self) -> bool:
        every = self.cfg.checkpoint.every_steps
        return bool(every) and self.next_step % every == 0

    def _log_window(self, lr: float, elapsed: float, waited: float, batch: Any, progress: TrainProgress) -> None:
        self._stop_if_not_finite()
        steps = self.meter.count
        row: dict[str, Any] = {"step": self.next_step, "epoch": self.next_step / self.steps_per_epoch, "lr": lr}
        row |= self.meter.read() | self.step.measure(batch)
        row |= {"img_per_s": steps * self.cfg.data.batch_size / elapsed, "data_wait": waited / elapsed, "bad_images": len(self.loader.replaced)}
        if self.parts.device.type == "cuda":
            row["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.parts.device) / 2**30
        self.log.metrics(row)
        progress.values(row)

    def _stop_if_not_finite(self) -> None:
        if self.worst_streak.item() > self.update.tolerated:
            self._save(best=False)
            raise NotFinite(
                f"the loss or a gradient was not a number in the steps before {self.next_step}; those steps were not applied and the state is kept "
                f"in {self.output / 'checkpoints'}; lower --lr, set --clip-grad, or look at the data and weights"
            )

    @property
    def evaluated(self) -> Student:
        """The weights that evaluation uses: the EMA's when there is one."""
        return self.update.ema.module if self.update.ema is not None else self.parts.student

    def validate(self) -> Result:
        return self.judge(self.evaluated, self.cfg.data.val_split)

    def judge(self, model: torch.nn.Module, suite: str) -> Result:
        raise AssertionError

    def _save(self, best: bool) -> None:
        ema = self.update.ema
        optimizer, optimizer_state = flatten_optimizer(self.update.optimizer)
        tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in self.parts.student.state_dict().items()}
        if ema is not None:
            tensors |= {f"ema.{k}": v for k, v in ema.module.state_dict().items()}
        tensors |= optimizer | generator_tensors(self.parts.device) | self.meter.tensors()
        state = {
            "config": to_toml(self.cfg),
            "optimizer": optimizer_state,
            "scaler": self.update.scaler.state_dict(),
            "best_top1": self.best_top1,
            "train_seconds": self.train_seconds,
            "metrics_offset": self.log.offset(),
            "classes": self.parts.train.classes.to_json(),
            "data": self.parts.train.fingerprint,
        }
        self.checkpoints.save(self.next_step, tensors, state, self.write_model, best)

    def write_model(self, path: Path) -> None:
        """`model.safetensors`: the weights that evaluation uses, with what is needed to use them."""
        save_student(path, self.evaluated, {
            "dad_fast.method": self.cfg.method,
            "dad_fast.classes": self.parts.train.classes.to_json(),
            "dad_fast.ema": str(self.cfg.ema.model_ema).lower(),
        })  # fmt: skip

    def _restore(self, resume: str, allow_config_change: bool) -> int:
        """Load a checkpoint; returns the length of metrics.jsonl at that moment."""
        found = self.checkpoints.load(resume, print)
        if found is None:
            return 0
        changed = differences(from_toml(found.state["config"], str(found.path)), self.cfg)
        if found.state["data"] != self.parts.train.fingerprint:
            changed.append(f"the images in {self.cfg.data.data_dir} are not those the run began with")
        if changed and not allow_config_change:
            raise UsageError(f"--resume: settings differ from the run in {found.path}: {'; '.join(changed)}; restore them, or add --allow-config-change")

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}

        self.parts.student.load_state_dict(under("student."))
        if self.update.ema is not None and under("ema."):
            self.update.ema.module.load_state_dict(under("ema."))
        restore_optimizer(self.update.optimizer, found.tensors, found.state["optimizer"])
        self.update.scaler.load_state_dict(found.state["scaler"])
        restore_generators(found.tensors, self.parts.device)
        self.meter.restore(found.tensors, self.parts.device)
        self.next_step, self.best_top1 = found.state["step"], found.state["best_top1"]
        self.train_seconds = found.state["train_seconds"]
        return int(found.state["metrics_offset"])
