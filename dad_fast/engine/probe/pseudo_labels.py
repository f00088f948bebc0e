"""Pseudo-labels: the teacher's predictions on the weak view (the centre crop of evaluation) of
every training image.

They depend only on the teacher, the images and the view. The cache folder keeps them under a hash
of these, 12 bytes an image, so they serve every seed, every setting of the probe and every resumed
run. Processes share the work.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dad_fast.cache import cache_dir
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.subset import Subset
from dad_fast.distributed import process_group as distributed
from dad_fast.errors import DataError
from dad_fast.methods.lp_clip import pseudo_labels
from dad_fast.models.teacher import Teacher
from dad_fast.models.weights.files import read_state_dict, write_safetensors

SECONDS_BETWEEN_LINES = 10.0


class PseudoLabels:
    """Labels and confidences of a source's samples; `prepare` makes or reads them."""

    def __init__(
        self,
        teacher: Teacher,
        source: Source,
        view: View,
        identity: Mapping[str, Any],
        batch_size: int,
        workers: int,
        device: torch.device,
    ) -> None:
        """Create pseudo-labels.

        identity: everything about the teacher that its predictions depend on, by name, as JSON.
        """
        self.teacher = teacher
        self.source = source
        self.view = view
        self.batch_size = batch_size
        self.workers = workers
        self.device = device
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

    def prepare(self, log: Callable[[str], None]) -> None:
        """Read pseudo-labels from the cache, or make them.

        A collective; `log` gets lines of text.
        """
        if self._labels is not None:
            return
        # Every machine has its own cache: all of them read, or all make.
        if all(distributed.all_gather_json(self._read())):
            log(f"pseudo-labels of {len(self.source):,} images from {self.path}")
            return
        self._labels, self._confidence = self._made(log)
        tensors = {"labels": self._labels, "confidence": self._confidence}
        # The run does not need the cache: a full disk must not end it.
        with suppress(OSError):
            write_safetensors(self.path, tensors, {"key": self.key})

    def of(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels int64 [B] and confidences float32 [B] of samples int64 [B], all on
        the CPU.
        """
        assert self._labels is not None and self._confidence is not None, "prepare() first"
        return self._labels[samples], self._confidence[samples]

    def _read(self) -> bool:
        """Read the cache. Returns False if it is missing, damaged or of something else."""
        try:
            state, metadata = read_state_dict(self.path)
            labels, confidence = state["labels"], state["confidence"]
        except (DataError, KeyError):
            return False
        num = len(self.source)
        if metadata.get("key") != self.key or labels.shape != (num,) or confidence.shape != (num,):
            return False
        self._labels, self._confidence = labels.long(), confidence.float()
        return True

    @torch.no_grad()
    def _made(self, log: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        num = len(self.source)
        labels = torch.zeros(num, dtype=torch.int64)
        confidence = torch.zeros(num)
        mine = share(np.flatnonzero(self.source.ok), self.batch_size)
        subset = Subset(self.source, mine, self.source.labels[mine])
        pin = self.device.type == "cuda"
        loader = EvalLoader(subset, self.view, self.batch_size, self.workers, pin_memory=pin)
        progress = Lines(log, "pseudo-labels", len(mine))
        done = 0
        for batch in loader:
            pixels = to_pixels(batch.images.to(self.device, non_blocking=True))
            found = pseudo_labels(self.teacher(pixels))
            rows = torch.from_numpy(mine)[batch.samples]
            labels[rows], confidence[rows] = (tensor.cpu() for tensor in found)
            done += len(rows)
            progress(done)
        return distributed.all_reduce_sums(labels), distributed.all_reduce_sums(confidence)


def share(samples: np.ndarray, batch_size: int) -> np.ndarray:
    """Return this process's part of `samples`, in whole batches.

    The batches do not depend on the number of processes, and so rounding does not. The parts are
    disjoint: a sum over processes, of zeros and values, joins them.
    """
    batches = np.arange(len(samples)) // batch_size
    return samples[batches % distributed.world() == distributed.rank()]


class Lines:
    """Progress of a pass over images: a line at the start, every few seconds, and at the end."""

    def __init__(self, log: Callable[[str], None], what: str, total: int) -> None:
        self._log = log
        self._what = what
        self._total = total
        self._start = self._last = time.monotonic()
        world = distributed.world()
        among = f" by each of {world} processes" if world > 1 else ""
        log(f"making {what} of {total:,} images, once{among}")

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        seconds = now - self._start
        if done >= self._total:
            self._log(f"{self._what}: {done:,} images in {seconds:.1f} s")
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            left = seconds * (self._total / done - 1)
            self._log(f"{self._what}: {done:,} of {self._total:,} images, {left:.0f} s left")
