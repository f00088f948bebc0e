"""`dad-fast fit-discretizer`: train a small VQ autoencoder on a user's own images."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dad_fast.checkpoint.folder import CheckpointFolder
from dad_fast.checkpoint.state import seed_generators
from dad_fast.config.options_fit import FitOptions
from dad_fast.config.schema import AugmentConfig, DataConfig
from dad_fast.data.augment.mixing import to_levels, to_pixels
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.loader import EvalLoader, TrainLoader
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.splits import open_split
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.discretizers.vqgan.training import perplexity
from dad_fast.distributed.device import resolve_device
from dad_fast.distributed.signals import StopRequest, stop_requests
from dad_fast.errors import DataError, NotFinite, UsageError
from dad_fast.locks import lock_folder
from dad_fast.loggers.progress import TrainProgress
from dad_fast.loggers.run_log import RunLog
from dad_fast.models.float32 import float32_math
from dad_fast.models.weights.files import fingerprint
from dad_fast.store.sheet import draw_sheet
from dad_fast.tools.fit_discretizer.fit import Fit
from dad_fast.tools.fit_discretizer.perceptual import Perceptual, load_perceptual

LARGEST_SIDE = 128
MEASURED = 2000  # images of the final figures
SHEET = 24
LABEL = "fit-discretizer"
# Options that may differ when a run resumes, since they change no result
NOT_COMPARED = ("output", "resume", "overwrite", "workers", "device", "log_every", "every_steps")
RESUME_HINT = "resume with --resume auto"


def run(options: FitOptions) -> int:
    """Train, write the weights and the sheet, and return the exit code."""
    output = Path(options.output)
    folder = output.with_name(f"{output.stem}-fit")
    with lock_folder(folder):
        _check_output(options, output, folder)
        device = resolve_device(options.device)
        data = DataConfig(
            data_dir=options.data_dir,
            train_split=options.train_split,
            val_split=options.val_split,
            val_fraction=options.val_fraction,
        )
        train = open_split(data, options.train_split)
        val = _open_val(data, train)
        side = _image_side(options, train)
        perceptual = None
        if options.perceptual:
            perceptual = load_perceptual(options.perceptual, side, device)
        loader = TrainLoader(
            train,
            AugmentConfig(img_size=side, scale=(0.5, 1.0), hflip=options.hflip, color_jitter=0.0),
            side,
            options.batch_size,
            options.seed,
            options.workers,
            pin_memory=device.type == "cuda",
        )
        seed_generators(options.seed)
        with float32_math(tf32=True):
            run = _Run(options, output, folder, loader, val, side, device, perceptual)
            return run.train()


def _check_output(options: FitOptions, output: Path, folder: Path) -> None:
    """Raise UsageError for existing results that the options do not resume or replace."""
    found = next((path for path in (output, folder / "checkpoints") if path.exists()), None)
    if found is None or options.resume:
        return
    if not options.overwrite:
        raise UsageError(f"{found} exists: add --resume auto or --overwrite, or name another file")
    if output.is_dir():
        raise UsageError(f"--output {output}: a folder; name a .safetensors file")


def _open_val(data: DataConfig, train: Source) -> Source:
    """Open the images of the final figures. Raises DataError or UsageError with this command's fix."""
    if not data.val_split:
        return train
    try:
        return open_split(data, data.val_split)
    except (DataError, UsageError) as error:
        reason = str(error).partition(";")[0]
        fix = 'name another --val-split, hold out --val-fraction 0.1, or "" for training images'
        raise type(error)(f"--val-split {data.val_split}: {reason}; {fix}") from None


def _image_side(options: FitOptions, source: Source) -> int:
    """Return the side to train at: --img-size, or the data's median shorter side, at most 128."""
    factor = int(options.factor)
    side = options.img_size or int(min(np.median(source.sizes.min(axis=1)), LARGEST_SIDE))
    if options.img_size and side % factor:
        raise UsageError(
            f"--img-size {side}: no multiple of --factor {factor}, the side of a code; "
            f"use {max(1, side // factor) * factor}"
        )
    if side < 2 * factor:
        raise DataError(
            f"--data-dir {options.data_dir}: images of {side} px are too small for --factor "
            f"{factor}; lower it, or set --img-size"
        )
    return side // factor * factor


class _Measured(NamedTuple):
    """Reconstruction of held-out images."""

    rms: float  # of pixels in [0, 1]
    codes_used: float
    perplexity: float

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB."""
        return -20.0 * math.log10(max(self.rms, 1e-9))


class _Run:
    """One training run: loop, checkpoints, results."""

    def __init__(
        self,
        options: FitOptions,
        output: Path,
        folder: Path,
        loader: TrainLoader,
        val: Source,
        side: int,
        device: torch.device,
        perceptual: Perceptual | None,
    ) -> None:
        self.options = options
        self.output = output
        self.folder = folder
        self.loader = loader
        self.val = val
        self.side = side
        self.device = device
        steps = options.epochs * loader.steps_per_epoch
        self.total_steps = min(steps, options.max_steps) if options.max_steps else steps
        self.fit = Fit(options, self.total_steps, device, perceptual)
        self.fit.vqgan.image_size = side
        self.next_step = 0
        self.identity: dict[str, Any] = {
            "data": loader.source.fingerprint,
            "side": side,
            **{k: v for k, v in asdict(options).items() if k not in NOT_COMPARED},
        }
        if perceptual is not None:
            self.identity["weights of --perceptual"] = fingerprint(perceptual)
        if options.overwrite and not options.resume:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            for name in ("train.log", "metrics.jsonl", "sheet.png"):
                (folder / name).unlink(missing_ok=True)
        self.checkpoints = CheckpointFolder(folder / "checkpoints", keep=1)
        self.notes: list[str] = []
        self.metrics_offset = 0
        if options.resume:
            self._restore()

    def _restore(self) -> None:
        found = self.checkpoints.load(self.options.resume, self.notes.append)
        if found is None:
            return
        # An option that is newer than the checkpoint had its default.
        before = {**asdict(FitOptions()), **found.state.get("identity", {})}
        for name, value in self.identity.items():
            # Through JSON a tuple is a list.
            now = list(value) if isinstance(value, tuple) else value
            if before.get(name) != now:
                flag = name.replace("_", "-")
                raise UsageError(
                    f"--resume: {found.path} was made with {flag} {before.get(name)}, not {now}; "
                    "restore it, or name another --output"
                )
        self.fit.restore(found.tensors, found.state)
        self.next_step = found.state["step"]
        self.metrics_offset = found.state["metrics_offset"]

    def train(self) -> int:
        """Train to the last step, then write weights and sheet."""
        with RunLog(self.folder) as log, stop_requests() as stop:
            log.truncate_to(self.metrics_offset)
            self.checkpoints.settle()
            for line in [*self.notes, *self._summary()]:
                log.say(line)
            self._steps(log, stop)
            measured = self._measure()
            self.fit.vqgan.save(self.output, self._seen())
            self._write_sheet()
            log.metrics("val", step=self.next_step, psnr=measured.psnr, **measured._asdict())
            on = self.options.val_split or self.options.train_split
            log.say(
                f"{self.output}: on {on} an rms error of {measured.rms:.4f} "
                f"({measured.psnr:.1f} dB), {measured.codes_used:.0%} of the codes in use, "
                f"perplexity {measured.perplexity:.0f}; originals and reconstructions in "
                f"{self.folder / 'sheet.png'}"
            )
            log.say(f"use it: dad-fast train ... --discretizer {self.output}")
        print(self.output)
        return 0

    def _steps(self, log: RunLog, stop: StopRequest) -> None:
        options, per_epoch = self.options, self.loader.steps_per_epoch
        batch_size, start = options.batch_size, self.next_step
        progress = TrainProgress(
            self.total_steps, batch_size, per_epoch, LABEL, log, start_step=start
        )
        with progress:
            for batch in self.loader.batches(start, self.total_steps):
                pixels = to_pixels(batch.images.to(self.device, non_blocking=True))
                lr = self.fit.step(self.next_step, per_epoch, pixels)
                self.next_step += 1
                progress.tick()
                is_last = self.next_step == self.total_steps
                if is_last or self.next_step % options.log_every == 0:
                    self._log(log, lr, progress)
                every = options.every_steps or per_epoch
                if is_last or stop.error or self.next_step % every == 0:
                    self._save(log)
                    progress.pause()
                if stop.error and not is_last:
                    where = f"step {self.next_step} of {self.total_steps}"
                    raise stop.error(f"stopped at {where}; saved in {self.folder}, {RESUME_HINT}")

    def _log(self, log: RunLog, lr: float, progress: TrainProgress) -> None:
        values = self.fit.window()
        if not math.isfinite(values["loss"]):
            raise NotFinite(
                f"the loss is {values['loss']} before step {self.next_step}; start again with a "
                f"lower --lr than {self.options.lr:g} and --overwrite"
            )
        log.metrics("train", step=self.next_step, lr=lr, **values)
        progress.update(values)

    def _save(self, log: RunLog) -> None:
        log.sync()
        tensors, state = self.fit.state()
        state |= {"identity": self.identity, "metrics_offset": log.offset()}
        self.checkpoints.save(
            self.next_step,
            tensors,
            state,
            lambda path: self.fit.vqgan.save(path, self._seen()),
            best=False,
        )

    def _summary(self) -> list[str]:
        vqgan = self.fit.vqgan
        config = vqgan.config
        count = sum(p.numel() for p in vqgan.parameters()) / 1e6
        grid = self.side // config.downsample
        form = f"FSQ {list(config.levels)}" if config.levels else f"{config.embed_dim} dimensions"
        steps = f"{self.next_step:,} to {self.total_steps:,} of {self.options.batch_size} images"
        if self.next_step == self.total_steps:
            steps = f"all {self.total_steps:,} are done"
        return [
            f"{LABEL}: seed {self.options.seed}, on {self.device}",
            f"  data     {self.loader.source.describe()}",
            f"  model    VQGAN, {count:.2f} M parameters, images of {self.side} px",
            f"  codes    {grid}x{grid} of {config.n_embed:,} per image, {form}",
            f"  steps    {steps}",
        ]

    def _seen(self) -> str:
        return f"{self.loader.source.describe()}; cropped and flipped, {self.side} px"

    def _eval_loader(self, batch_size: int) -> EvalLoader:
        return EvalLoader(self.val, View(self.side, 1.0, "bicubic"), batch_size, workers=0)

    @torch.no_grad()
    def _measure(self) -> _Measured:
        vqgan = self.fit.vqgan
        uses = torch.zeros(vqgan.config.n_embed, dtype=torch.int64)
        error, count, images = 0.0, 0, 0
        for batch in self._eval_loader(self.options.batch_size):
            pixels = to_pixels(batch.images.to(self.device))
            codes = vqgan.codes(pixels)
            error += (vqgan.decode(codes) - pixels).double().square().sum().item()
            count += pixels.numel()
            images += len(pixels)
            uses += torch.bincount(codes.flatten().cpu(), minlength=len(uses))
            if images >= MEASURED:
                break
        used = (uses > 0).float().mean().item()
        return _Measured(math.sqrt(error / count), used, perplexity(uses))

    @torch.no_grad()
    def _write_sheet(self) -> None:
        vqgan: VQGAN = self.fit.vqgan
        batch = next(iter(self._eval_loader(SHEET)))
        pixels = to_pixels(batch.images.to(self.device))
        decoded = vqgan.decode(vqgan.codes(pixels))
        columns = {
            name: to_levels(images).permute(0, 2, 3, 1).cpu().numpy()
            for name, images in (("original", pixels), ("reconstruction", decoded))
        }
        errors = (decoded - pixels).square().flatten(1).mean(1).sqrt().tolist()
        draw_sheet(self.folder / "sheet.png", columns, [f"rms {error:.3f}" for error in errors])
