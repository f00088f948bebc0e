"""Computation of a store's rows: identical bytes for any number of processes, stops and resumes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.config.options import StoreLaunch
from dad_fast.config.schema import Config
from dad_fast.data.augment.mixing import mix, soft_targets, to_pixels
from dad_fast.data.augment.records import uses_mixing
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.blocks import ImageBlock, blocks
from dad_fast.data.loaders.steps import TrainSteps
from dad_fast.data.loaders.workers import iterate
from dad_fast.data.sources.base import UNLABELLED, Source
from dad_fast.discretizers.base import Discretizer
from dad_fast.engine.diagnostics import Attacked, warning_of_weakness
from dad_fast.engine.fidelity import measure_fidelity, warning_of_misfit
from dad_fast.errors import DadFastError, DataError, UsageError
from dad_fast.kernels import pack_codes
from dad_fast.keyed_random import sample_seeds
from dad_fast.methods.attack import PGD
from dad_fast.models.float32 import float32_math
from dad_fast.models.teacher import Teacher
from dad_fast.precompute.adversarial import adversarial
from dad_fast.store import Manifest, RowBlock, StoreRows, StoreWriter
from dad_fast.store.files import Bytes
from dad_fast.store.images import decode_image, encode_images, on_all_cores
from dad_fast.store.join import view_settings

log = logging.getLogger(__name__)

# Approximate size of a shard, which is lost when a disk loses a file.
SHARD_BYTES = 1 << 30


class StoreBuilder(Protocol):
    """Interface of what computes the records of a store's rows."""

    manifest: Manifest

    def feed(self, rows: Sequence[RowBlock]) -> Iterator[Any]:
        """Yield the input of `records` for each of `rows`, in this order."""

    def records(self, rows: RowBlock, item: Any) -> StoreRows: ...


class AdversarialFiller:
    """Q(x') of every unaugmented image against the teacher, with its prediction for y where there is
    no label.

    View v draws its noise as training does in epoch v.
    """

    def __init__(
        self,
        cfg: Config,
        launch: StoreLaunch,
        source: Source,
        teacher: Teacher,
        discretizer: Discretizer,
        view: View,
        settings: dict[str, Any],
        hashes: dict[str, str | None],
        device: torch.device,
    ) -> None:
        self.cfg = cfg
        self.source = source
        self.teacher = teacher
        self.discretizer = discretizer
        self.view = view
        self.device = device
        self.attack = PGD.from_config(cfg.attack)
        self.images = launch.images
        self.unlabelled = bool((source.labels == UNLABELLED).any())
        self.unreadable: list[str] = []
        side = view.image_size
        codes = discretizer(torch.zeros(1, 3, side, side, device=device)).codes
        self.manifest = make_manifest(
            cfg,
            launch,
            source,
            "adversarial",
            hashes,
            {
                **settings,
                "attack": asdict(cfg.attack),
                "images": view.record(),
                "discretizer": hashes["discretizer"] or discretizer.name,
            },
            code_bits=discretizer.code_bits,
            code_grid=tuple(codes.shape[1:]) if codes is not None else (),
            images=launch.images,
            image_size=(side, side) if launch.images != "none" else (),
        )

    def feed(self, rows: Sequence[RowBlock]) -> Iterator[ImageBlock]:
        return blocks(
            self.source,
            [block.number for block in rows],
            self.manifest.block_size,
            self.view,
            self.cfg.data.workers,
            pin_memory=self.device.type == "cuda",
        )

    def records(self, rows: RowBlock, item: ImageBlock) -> StoreRows:
        self._note(item.unreadable)
        keys = torch.from_numpy(sample_seeds(self.cfg.seed, rows.view, item.samples.numpy()))
        images, labels, keys = (
            tensor.to(self.device, non_blocking=True) for tensor in (item.images, item.labels, keys)
        )
        if self.unlabelled:
            labels = self._answered(images, labels)
        if rows.view == rows.start == 0:
            self._check_attack(images, labels, keys)
        stored = _Stored(self.images)
        with float32_math(tf32=self.cfg.precision.tf32):
            found = adversarial(
                self.teacher,
                self.discretizer,
                self.attack,
                self.cfg.attack.order,
                images,
                labels,
                keys,
                len(self.source.classes),
                stored,
            )

        n = item.num_real
        codes = None
        if found.codes is not None:
            codes = _host(pack_codes(found.codes[:n].flatten(1), self.manifest.code_bits))
        return StoreRows(
            keys=[self.source.keys[i] for i in range(rows.start, rows.stop)],
            labels=item.labels[:n].numpy(),
            outputs=_host(found.outputs[:n]),
            readable=item.readable[:n].numpy(),
            kept=_host(found.kept[:n]),
            changed=None if found.changed is None else _host(found.changed[:n]),
            codes=codes,
            images=stored.content(n),
        )

    @torch.no_grad()
    def _answered(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return `labels` with the teacher's predictions where there are none."""
        with float32_math(tf32=self.cfg.precision.tf32):
            answers = self.teacher(to_pixels(images)).argmax(dim=-1)
        return labels.where(labels != UNLABELLED, answers)

    def _check_attack(self, images: Tensor, labels: Tensor, keys: Tensor) -> None:
        """Warn if the attack changes next to nothing on the first images, or if the discretizer
        does not fit them.
        """
        targets = soft_targets(labels, len(self.source.classes))
        inputs = to_pixels(images), targets, keys
        order = self.cfg.attack.order
        attacked = Attacked(self.discretizer, self.teacher, self.attack, order, inputs)
        effect = attacked.measure()
        if warning := warning_of_weakness(effect, self.cfg.attack, self.discretizer.name):
            log.warning(warning)
        found = measure_fidelity(self.discretizer, inputs[0])
        if warning := warning_of_misfit(found, self.discretizer):
            log.warning(warning)

    def _note(self, names: Sequence[str]) -> None:
        self.unreadable += names
        if len(self.unreadable) > self.source.max_bad_share * len(self.source):
            raise DataError(
                f"{self.source.name}: {len(self.unreadable):,} of {len(self.source):,} images "
                f"cannot be read any more, such as {self.unreadable[0]}; "
                "fix or remove them, or raise data.max_bad_share"
            )


class _Stored:
    """Encoder of images on their way into the store.

    A call with levels uint8 [B, 3, H, W] returns the levels that a reader will get. JPEG changes
    the pixels, and the teacher's outputs must belong to the changed ones; so images are encoded
    here, once.
    """

    def __init__(self, form: str) -> None:
        self.form = form

    def __call__(self, levels: Tensor) -> Tensor:
        self._kept: Any = levels
        if not self.form.startswith("jpeg"):
            return levels
        self._kept = encode_images(levels.permute(0, 2, 3, 1).cpu().numpy(), self.form)
        size = tuple(levels.shape[2:])
        again = on_all_cores(
            lambda file: decode_image(bytes(file), size, "an image just encoded"),
            self._kept,
            self.form,
        )
        return torch.from_numpy(np.stack(again)).to(levels.device).permute(0, 3, 1, 2)

    def content(self, num: int) -> np.ndarray | list[Bytes] | None:
        """Return the first `num` images in the form that a store takes."""
        if self.form == "none":
            return None
        kept = self._kept[:num]
        return kept if isinstance(kept, list) else _host(kept.permute(0, 2, 3, 1).contiguous())


class TargetFiller:
    """The teacher's logits on clean images as training uses them: view v is epoch v with its mixes.

    A row is a position in the order of its view and has the key of the sample at that position.
    """

    def __init__(
        self,
        cfg: Config,
        launch: StoreLaunch,
        source: Source,
        teacher: Teacher,
        img_size: int,
        settings: dict[str, Any],
        hashes: dict[str, str | None],
        device: torch.device,
    ) -> None:
        self.cfg = cfg
        self.source = source
        self.teacher = teacher
        self.img_size = img_size
        self.device = device
        views = {"augment": view_settings(cfg.augment), "img_size": img_size}
        self.manifest = make_manifest(cfg, launch, source, "targets", hashes, {**settings, **views})
        if uses_mixing(cfg.augment) and self.manifest.block_size % 2:
            raise UsageError(
                f"--block-size {self.manifest.block_size}: must be even with --mixup or --cutmix, "
                "which mix images in pairs"
            )

    def feed(self, rows: Sequence[RowBlock]) -> Iterator[Places]:
        steps = TrainSteps(
            self.source,
            self.cfg.augment,
            self.img_size,
            self.manifest.block_size,
            self.cfg.seed,
            rank=0,
            world=1,
        )
        numbers = [(block.view, block.start) for block in rows]
        pin_memory = self.device.type == "cuda"
        return iterate(_Places(steps), numbers, self.cfg.data.workers, pin_memory)

    @torch.no_grad()
    def records(self, rows: RowBlock, item: Places) -> StoreRows:
        images, labels, kind, lam, box = (
            tensor.to(self.device, non_blocking=True) for tensor in item.tensors
        )
        mixed = mix(to_pixels(images), labels, kind, lam, box, len(self.source.classes))
        with float32_math(tf32=self.cfg.precision.tf32):
            outputs = self.teacher(mixed.pixels)
        n = rows.stop - rows.start
        return StoreRows(
            keys=[self.source.keys[i] for i in item.drawn[:n].tolist()],
            labels=self.source.labels[item.drawn[:n].numpy()],
            outputs=_host(outputs[:n]),
        )


class Places(NamedTuple):
    """Augmented images of consecutive positions in the order of a view."""

    drawn: Tensor  # int64 [B], samples
    # images uint8 [B, 3, H, W]; labels, mix_kind, mix_lam, mix_box as in a Batch.
    tensors: tuple[Tensor, ...]

    def pin_memory(self) -> Places:
        return Places(self.drawn, tuple(tensor.pin_memory() for tensor in self.tensors))


class _Places(Dataset[Places]):
    """(view, first position) -> Places."""

    def __init__(self, steps: TrainSteps) -> None:
        self.steps = steps

    def __getitem__(self, where: tuple[int, int]) -> Places:
        images, found = self.steps.made(*where)
        return Places(
            found["drawn"],
            (images, found["labels"], found["mix_kind"], found["mix_lam"], found["mix_box"]),
        )


def make_manifest(
    cfg: Config,
    launch: StoreLaunch,
    source: Source,
    kind: str,
    hashes: dict[str, str | None],
    settings: dict[str, Any],
    **form: Any,
) -> Manifest:
    """Make the manifest of a store of this data and form, with shards of about SHARD_BYTES."""
    outputs = launch.outputs
    if outputs.startswith("topk:") and "@" not in outputs:
        outputs += f"@{cfg.loss.temperature:g}"
    common: dict[str, Any] = {
        "kind": kind,
        "classes": source.classes.entries,
        "source": source.fingerprint,
        "settings": settings,
        "hashes": hashes,
        "num_samples": len(source),
        "num_views": launch.views,
        "block_size": launch.block_size or cfg.data.batch_size,
        "outputs": outputs,
    }
    per_block = sum(Manifest(**common, **form).bytes_per_sample.values()) * common["block_size"]
    return Manifest(
        **common,
        **form,
        blocks_per_shard=launch.shard_blocks or max(1, min(SHARD_BYTES // per_block, 4096)),
    )


def fill(filler: StoreBuilder, folder: Path, rank: int, world: int) -> Iterator[StoreRows]:
    """Write this process's part of the store; yields the records of each block after writing them.

    Closing the generator early loses nothing. Raises DataError when the folder holds a store with
    other settings, or the disk is full.
    """
    writer = StoreWriter.open(folder, filler.manifest, resume=True)
    work: list[tuple[int, RowBlock]] = []
    for number in writer.shards_to_do(rank, world):
        work += [(number, rows) for rows in writer.blocks_to_do(number)]
    feed = filler.feed([rows for _, rows in work])
    for number, group in groupby(work, key=lambda pair: pair[0]):
        with writer.shard(number) as shard:
            for _, rows in group:
                records = filler.records(rows, next(feed))
                shard.append(records)
                yield records
    writer.finish()


def estimate(filler: StoreBuilder, num_blocks: int = 3) -> float:
    """Return the seconds per block on this machine: the median of a few after one warm-up."""
    geometry = filler.manifest.geometry
    rows = [block for shard in range(geometry.num_shards) for block in geometry.blocks(shard)]
    rows = rows[: num_blocks + 1]
    times = []
    start = time.perf_counter()
    for block, item in zip(rows, filler.feed(rows), strict=True):
        filler.records(block, item)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return float(np.median(times[1:] or times))


def _host(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array


def stopped(error: type[DadFastError], done: int, folder: Path) -> DadFastError:
    return error(
        f"stopped after {done:,} blocks of this call; all of them are in {folder}, "
        "run the same command to resume"
    )
