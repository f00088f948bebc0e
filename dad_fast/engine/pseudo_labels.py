"""Pseudo-labels: the teacher's answers on the weak view (the evaluation's centre crop) of every training image, found once.

They depend on nothing but the teacher, the images and the view. So they are kept in the cache folder under a hash of these, 12 bytes an
image, and serve every seed, every setting of the probe and every resumed run. Several processes share the work.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dad_fast.cache import cache_dir
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.base import Source
from dad_fast.distributed import process_group as distributed
from dad_fast.errors import DataError
from dad_fast.evaluate.suites.base import Subset
from dad_fast.methods.lp_clip import pseudo_labels
from dad_fast.models.teacher import Teacher
from dad_fast.models.weights.files import read_state_dict, write_safetensors

SECONDS_BETWEEN_LINES = 10.0


class WeakView(NamedTuple):
    """timm's evaluation view."""

    img_size: int
    crop_pct: float
    interpolation: str


class PseudoLabels:
    """Labels and confidences of a source's samples, made or read by `prepare`.

    identity: everything about the teacher that its answers depend on, by name, as JSON can hold it.
    """

    def __init__(
        self,
        teacher: Teacher,
        source: Source,
        view: WeakView,
        identity: Mapping[str, Any],
        batch_size: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self.teacher, self.source, self.view = teacher, source, view
        self.batch_size, self.workers, self.device = batch_size, workers, device
        facts = {
            **identity,
            "images": source.fingerprint,
            "view": list(view),
            "batch_size": batch_size,
            "device": device.type,
        }
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.path = cache_dir() / "pseudo-labels" / f"{self.key[:32]}.safetensors"
        self._labels: Tensor | None = None
        self._confidence: Tensor | None = None

    def prepare(self, say: Callable[[str], None]) -> None:
        if self._labels is not None:
            return
        if all(distributed.all_gather_json(self._read())):  # machines have caches of their own
            say(f"pseudo-labels of {len(self.source):,} images from {self.path}")
            return
        self._labels, self._confidence = self._made(say)
        try:
            write_safetensors(
                self.path,
                {"labels": self._labels, "confidence": self._confidence},
                {"key": self.key},
            )
        except OSError:  # a cache is a convenience, not a need
            pass

    def of(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Labels int64 [B] and confidences float32 [B] of samples int64 [B], all on the CPU."""
        assert self._labels is not None and self._confidence is not None, "prepare() first"
        return self._labels[samples], self._confidence[samples]

    def _read(self) -> bool:
        try:
            state, metadata = read_state_dict(self.path)
            labels, confidence = state["labels"], state["confidence"]
        except (DataError, KeyError):
            return False  # absent or damaged: made again
        num = len(self.source)
        if metadata.get("key") != self.key or labels.shape != (num,) or confidence.shape != (num,):
            return False
        self._labels, self._confidence = labels.long(), confidence.float()
        return True

    @torch.no_grad()
    def _made(self, say: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        num = len(self.source)
        labels, confidence = torch.zeros(num, dtype=torch.int64), torch.zeros(num)
        mine = share(np.flatnonzero(self.source.ok), self.batch_size)
        piece = Subset(self.source, mine, self.source.labels[mine])
        done, tell = 0, Lines(say, "pseudo-labels", len(mine))
        for batch in EvalLoader(
            piece, *self.view, self.batch_size, self.workers, pin_memory=self.device.type == "cuda"
        ):
            found = pseudo_labels(
                self.teacher(to_pixels(batch.images.to(self.device, non_blocking=True)))
            )
            rows = torch.from_numpy(mine)[batch.samples]
            labels[rows], confidence[rows] = (tensor.cpu() for tensor in found)
            done += len(rows)
            tell(done)
        return distributed.all_reduce_sums(labels), distributed.all_reduce_sums(confidence)


def share(samples: np.ndarray, batch_size: int) -> np.ndarray:
    """This process's part of `samples`: whole batches, the same ones whatever the number of processes, so that rounding is the same too.

    The parts are disjoint: sums over processes of zeros and values bring them together.
    """
    batches = np.arange(len(samples)) // batch_size
    return samples[batches % distributed.world() == distributed.rank()]


class Lines:
    """A line at the start, every few seconds, and at the end of a pass over images."""

    def __init__(self, say: Callable[[str], None], what: str, total: int) -> None:
        self._say, self._what, self._total = say, what, total
        self._start = self._last = time.monotonic()
        among = f" by each of {distributed.world()} processes" if distributed.world() > 1 else ""
        say(f"{what} of {total:,} images are made, once{among}")

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        seconds = now - self._start
        if done >= self._total:
            self._say(f"{self._what}: {done:,} images in {seconds:.1f} s")
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self._say(
                f"{self._what}: {done:,} of {self._total:,} images, {seconds * (self._total / done - 1):.0f} s left"
            )
