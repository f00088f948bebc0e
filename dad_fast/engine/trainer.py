"""One run: one method, one seed. `Trainer.train()` reads from top to bottom."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dad_fast.config import differences, from_toml, to_toml
from dad_fast.config.schema import Config
from dad_fast.data.loader import Batch, TrainLoader, resolve_loader, train_loader
from dad_fast.engine.build import Parts
from dad_fast.engine.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    flatten_optimizer,
    generator_tensors,
    restore_generators,
    restore_optimizer,
)
from dad_fast.engine.clock import Clock, input_bound
from dad_fast.engine.feed import feed
from dad_fast.engine.garbage import collections_between_steps
from dad_fast.engine.lp_clip import ProbeStep
from dad_fast.engine.lp_clip_features import FeatureLoader
from dad_fast.engine.meter import Meter
from dad_fast.engine.schedule import learning_rate, total_epochs
from dad_fast.engine.signals import stop_requests
from dad_fast.engine.step import TrainStep
from dad_fast.engine.update import Update
from dad_fast.errors import NotFinite, UsageError
from dad_fast.evaluate.runner import Result, Suite, evaluate
from dad_fast.models.discretizer import VQGANDiscretizer
from dad_fast.models.probe import Probe
from dad_fast.models.student import Student, save_student
from dad_fast.observe.device import Gpu
from dad_fast.observe.progress import TrainProgress
from dad_fast.observe.runlog import RunLog, print_line


class Trainer:
    """Trains `parts.student` into the folder `output`. Building one checks everything and writes nothing; then `start()`, `train()`.

    resume: "" starts at step 0; "auto" goes on from the newest sound checkpoint in `output`; a path goes on from that checkpoint.
    """

    def __init__(self, cfg: Config, parts: Parts, output: Path, label: str, resume: str = "", allow_config_change: bool = False):
        self.cfg, self.parts, self.output, self.label = cfg, parts, output, label
        random.seed(cfg.seed)
        np.random.seed(cfg.seed % 2**32)
        torch.manual_seed(cfg.seed)  # again, after the student was built: a run draws the same whatever its initial weights took
        self.update = Update(parts.student, cfg, parts.device)
        if isinstance(parts.student, Probe):
            self.step: TrainStep = ProbeStep(cfg, parts.student, self.update)
        else:
            self.step = TrainStep(cfg, parts.student, parts.teacher, parts.discretizer, self.update)
        self.images_per_step = cfg.data.batch_size * cfg.engine.grad_accum_steps
        self.loader = self._loader()
        self.steps_per_epoch = self.loader.steps_per_epoch
        steps = round(total_epochs(cfg.schedule) * self.steps_per_epoch)
        self.total_steps = min(steps, cfg.max_steps) if cfg.max_steps else steps
        self.meter = Meter()
        self.next_step = 0
        self.best_top1 = -1.0
        self.clock = Clock(parts.device)
        self.windows, self.advised, self.bad_latents = 0, False, 0
        self.gpu = Gpu.open(parts.device.index or 0) if parts.device.type == "cuda" else None
        self.worst_streak = torch.zeros((), device=parts.device)
        self.checkpoints = CheckpointFolder(output / "checkpoints", cfg.checkpoint.keep)
        found = self.checkpoints.load(resume, print_line) if resume else None
        if found is not None:
            self._restore(found, allow_config_change)
        self.metrics_offset = found.state["metrics_offset"] if found else 0

    def _loader(self) -> TrainLoader | FeatureLoader:
        cfg, parts = self.cfg, self.parts
        if parts.probe is not None and parts.probe.features is not None:
            return FeatureLoader(parts.probe.features, self.images_per_step, cfg.seed, pin_memory=parts.device.type == "cuda")
        return train_loader(
            cfg.data.loader, parts.train, cfg.augment, parts.student.image_size, self.images_per_step,
            seed=parts.stored.view_seed(cfg.seed), workers=cfg.data.workers, device=parts.device, cycle=parts.stored.cycle,
        )  # fmt: skip

    def start(self) -> None:
        """Open the logs, say what is about to happen, and make what the steps need before the first of them."""
        self.log = RunLog(self.output)
        self.log.truncate_to(self.metrics_offset)
        cfg, parts = self.cfg, self.parts
        millions = sum(p.numel() for p in parts.student.parameters()) / 1e6
        lines = [
            f"{self.label}: {cfg.method}, {parts.student.name} ({millions:.2f} M parameters) on {parts.device}, "
            f"steps {self.next_step:,} to {self.total_steps:,} of {self.images_per_step} images",
            parts.train.describe(),
        ]
        if parts.teacher is not None:
            lines.append(f"teacher {parts.teacher.name}; it has seen: {parts.teacher.provenance}")
        if parts.discretizer is not None:
            lines.append(f"discretizer {parts.discretizer.name}; it has seen: {parts.discretizer.provenance}")
        if isinstance(parts.discretizer, VQGANDiscretizer) and parts.discretizer.range_note:
            lines.append(parts.discretizer.range_note)
        for part, found in parts.savings.items():
            texts = [f"not {name} ({why})" if why else name for name, why in found.items()]
            lines.append(f"savings of the {part}: {', '.join(texts) or 'none'}")
        if self.loader.name != FeatureLoader.name:
            loader, why = resolve_loader(cfg.data.loader, parts.train, parts.device)
            lines.append(f"loader {loader}: {why}")
        lines += [f"{store.kind} from {store.folder}: {store.num_views} views of {len(store):,} images" for store in parts.stored.stores]
        for line in lines:
            self.log.say(line, echo=line is lines[0])
        if parts.probe is not None:
            parts.probe.prepare(self.log.say)

    def train(self) -> dict[str, float]:
        """Runs to the end, or until a signal asks to stop: then the state is saved and Preempted or Interrupted raised."""
        cuda = self.parts.device.type == "cuda"
        batches = self.parts.stored.join(self.loader.batches(self.next_step, self.total_steps), cuda)
        if self.parts.probe is not None:
            batches = self.parts.probe.join(batches, cuda)
        batches = feed(batches, self.parts.device)
        with stop_requests() as stop, self._progress() as progress, collections_between_steps():
            clock, first = self.clock, True
            clock.skip()
            while self.next_step < self.total_steps:
                batch = next(batches)
                if first:
                    self._check_signal(batch)
                    clock.skip()
                    first = False

                lr = learning_rate(self.next_step, self.steps_per_epoch, self.cfg.optim, self.cfg.schedule)
                with clock.step():
                    scalars = self.step(batch, self.next_step, lr)
                self.meter.add(scalars)
                self.worst_streak = torch.maximum(self.worst_streak, self.update.bad_in_a_row)
                self.next_step += 1
                progress.tick()

                last, epoch_ends = self.next_step == self.total_steps, self.next_step % self.steps_per_epoch == 0
                if self.next_step % self.cfg.log_every == 0 or last:
                    self._log_window(lr, batch, progress)
                if last or epoch_ends or stop.error or self._checkpoint_due():
                    clock.count()
                    self._boundary(last, epoch_ends, bool(stop.error), progress)
                    clock.skip()
                    progress.pause()
                if stop.error and not last:
                    where = f"step {self.next_step} of {self.total_steps}"
                    raise stop.error(f"stopped at {where}; saved in {self.output}, go on with --resume auto")
        return {
            "seconds": self.clock.total,
            "steps": self.next_step,
            "epochs": self.next_step / self.steps_per_epoch,
            "best_val_top1": self.best_top1,
            "bad_images": len(self.loader.replaced),
            "failed_over": self.loader.failed_over,
        }

    def _progress(self) -> TrainProgress:
        return TrainProgress(self.total_steps, self.images_per_step, self.steps_per_epoch, self.label, self.log, start_step=self.next_step)

    def _boundary(self, last: bool, epoch_ends: bool, stopping: bool, progress: TrainProgress) -> None:
        """Validation and checkpoint, whichever are due."""
        self._stop_if_not_finite()
        gc.collect()
        epoch, every = self.next_step // self.steps_per_epoch, self.cfg.eval.every_epochs
        best = False
        if last or (epoch_ends and every and epoch % every == 0 and not stopping):
            result = self.judge(self.evaluated, Suite(self.cfg.data.val_split, self.parts.val), progress.evaluating("validation"))
            best = result.top1 > self.best_top1
            self.best_top1 = max(self.best_top1, result.top1)
            self.log.metrics("val", step=self.next_step, epoch=epoch, top1=result.top1, nll=result.nll, ece=result.ece)
        if last or stopping or best or self._checkpoint_due() or (epoch_ends and not self.cfg.checkpoint.every_steps):
            self._save(best)

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
        self._warn_of_bad_latents()
        values |= self.step.measure(batch) | {"data_wait": window.waited / window.seconds}
        self.windows += 1
        from_files = self.loader.name != FeatureLoader.name
        advice = input_bound(window, self.images_per_step, self.cfg.data.workers, self.loader.name, self.parts.device.type == "cuda")
        if advice and from_files and not self.advised and self.windows > 1:  # the first window holds the start of the loader's processes
            self.advised = True
            self.log.say(advice)
        self.clock.skip()
        if self.parts.device.type == "cuda":
            values["gpu_memory"] = torch.cuda.max_memory_allocated(self.parts.device) / 2**30
        progress.update(values)
        gpu = {"gpu": self.gpu.sample()} if self.gpu else {}
        self.log.metrics(
            "train", step=self.next_step, epoch=self.next_step / self.steps_per_epoch, lr=lr, **values,
            img_per_s=window.steps * self.images_per_step / window.seconds, bad_images=len(self.loader.replaced), **gpu,
        )  # fmt: skip

    def _warn_of_bad_latents(self) -> None:
        discretizer = self.parts.discretizer
        if isinstance(discretizer, VQGANDiscretizer) and not self.bad_latents:
            self.bad_latents = int(discretizer.vqgan.search().num_nonfinite)
            if self.bad_latents:
                what = f"{self.bad_latents:,} of the encoder's outputs so far were not numbers and got code 0"
                self.log.say(f"warning: {what}; set precision.encoder=float32, or look at the VQGAN's weights")

    def _stop_if_not_finite(self) -> None:
        if self.worst_streak.item() > self.update.tolerated:
            self._save(best=False)
            raise NotFinite(
                f"the loss or a gradient was not a number in a step before {self.next_step}; no such step was applied and the state is "
                f"kept in {self.checkpoints.root}; lower --lr, set --clip-grad, or look at the data and the weights"
            )

    @property
    def evaluated(self) -> Student:
        """The weights that evaluation uses: the EMA's when there is one."""
        return self.update.ema.module if self.update.ema is not None else self.parts.student

    def judge(self, model: nn.Module, suite: Suite, progress: Callable[[int, int], None] | None = None) -> Result:
        """`model` on `suite`, with the student's view of an image (size, crop, filter) and the run's precision."""
        student, aug = self.parts.student, self.cfg.augment
        with self.step.autocast():
            return evaluate(
                model, suite.source, name=suite.name, img_size=student.image_size, crop_pct=aug.crop_pct or student.crop_pct,
                interpolation=aug.interpolation or student.interpolation, batch_size=self.cfg.eval.batch_size or self.cfg.data.batch_size,
                workers=self.cfg.data.workers, device=self.parts.device, corruption=suite.corruption, progress=progress,
            )  # fmt: skip

    def _check_signal(self, batch: Batch) -> None:
        """Once a run: whether the attack can be seen above the encoder's rounding."""
        ratio = self.step.signal_to_rounding(batch)
        if ratio is None:
            return
        self.log.metrics("attack", step=self.next_step, signal_to_rounding=ratio)
        if ratio < 3:
            self.log.say(
                f"warning: the attack moves the encoder's output only {ratio:.2g} times as much as rounding does, so many codes "
                "change by chance; raise --attack-eps, or set precision.encoder=float32"
            )

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
            "train_seconds": self.clock.total,
            "metrics_offset": self.log.offset(),
            "classes": self.parts.train.classes.to_json(),
            "data": self.parts.train.fingerprint,
            "stores": self.parts.checksums,
            "loader": self.loader.name,
        }
        self.checkpoints.save(self.next_step, tensors, state, self.write_model, best)

    def write_model(self, path: Path) -> None:
        """`model.safetensors`: the weights that evaluation uses, with what is needed to use them."""
        save_student(path, self.evaluated, {
            "dad_fast.method": self.cfg.method,
            "dad_fast.classes": self.parts.train.classes.to_json(),
            "dad_fast.ema": str(self.cfg.ema.model_ema).lower(),
        })  # fmt: skip

    def _restore(self, found: Checkpoint, allow_config_change: bool) -> None:
        changed = differences(from_toml(found.state["config"], str(found.path)), self.cfg)
        if found.state.get("stores", {}) != self.parts.checksums:
            what = "the teacher's answers on the training images" if self.parts.probe else f"the stores {', '.join(self.cfg.store.dirs)}"
            changed.append(f"{what} are not those that the run began with")
        if found.state["data"] != self.parts.train.fingerprint:
            changed.append(f"the images in {self.cfg.data.data_dir} are not those that the run began with")
        if changed and not allow_config_change:
            what = "; ".join(changed)
            raise UsageError(f"--resume: not the settings of {found.path}: {what}; restore them, or add --allow-config-change")

        if found.state.get("loader", self.loader.name) != self.loader.name:
            print_line(f"the run began with the loader {found.state['loader']}; the pixels of {self.loader.name} differ slightly")

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
        self.clock.total = found.state["train_seconds"]
