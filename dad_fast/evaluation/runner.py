"""Evaluate a model on a suite: every readable image once, on any number of processes.

Scores stay on the device and are read once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.base import Source
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.signals import asked
from dad_fast.errors import DadFastError, DataError
from dad_fast.evaluation.corruptions.common import corrupt
from dad_fast.evaluation.corruptions.names import num_severities
from dad_fast.evaluation.metrics.image_scores import SCORES, image_scores
from dad_fast.evaluation.metrics.intervals import mean_interval
from dad_fast.evaluation.metrics.predictions import FIELDS, Records
from dad_fast.evaluation.metrics.result import Result, make_result
from dad_fast.evaluation.suites.base import (
    EvalSet,
    Subset,
    as_eval_set,
    corruption_summary,
    image_numbers,
)
from dad_fast.evaluation.suites.imagenet import alexnet_errors, corruption_errors
from dad_fast.evaluation.suites.open import Corruption, Suite, open_suites
from dad_fast.evaluation.suites.published import C_SIDE, C_VIEWS

__all__ = ["Result", "Suite", "evaluate", "open_suites", "records_of"]

Model = Callable[[Tensor], Tensor]
# Pixels [B, 3, H, W] and keys of the images [B] -> pixels for the model.
Transform = Callable[[Tensor, Tensor], Tensor]


def evaluate(
    model: Model,
    source: Source | EvalSet,
    *,
    view: View,
    batch_size: int,
    workers: int,
    device: torch.device,
    name: str = "",
    corruption: Corruption | None = None,
    progress: Callable[[int, int], None] | None = None,
    dali: bool = False,
    stopped: str = "stopped while evaluating",
) -> Result:
    """Evaluate `model` on a suite.

    model: pixels float32 [B, 3, H, W] in [0, 1] on `device` -> logits [B, C]. A module is in eval mode meanwhile. With several processes all of them must call this, and all
    get the whole result.

    Args:
        view: the model's, unless the suite has crop and filter of its own.
        progress: called with (images done, all images).
        dali: decode with DALI instead of PIL.
        stopped: message of Preempted and Interrupted.

    Raises:
        DataError: the model has fewer outputs than the source has classes, or no image is readable.
        Preempted, Interrupted: a signal asked a process to stop (inside `signals.stop_requests`);
            raised after the next batch, in all processes.
    """
    eval_set = as_eval_set(source)
    view = eval_set.view_for(view)
    records, num_outputs = records_of(
        model,
        eval_set,
        view,
        batch_size,
        workers,
        device,
        corruption,
        progress,
        dali,
        stopped,
    )
    facts: dict[str, Any] = {
        "skipped": sum(int((~piece.ok).sum()) for piece in eval_set.pieces),
        "protocol": protocol(eval_set, view) + ("; decoded by DALI" if dali else ""),
    }
    if eval_set.parts:
        facts |= _corruption_facts(eval_set, records)
    num_classes = len(eval_set.classes)
    return make_result(name or eval_set.name, records, num_outputs, num_classes, **facts)


def records_of(
    model: Model,
    eval_set: EvalSet,
    view: View,
    batch_size: int,
    workers: int,
    device: torch.device,
    corruption: Corruption | None = None,
    progress: Callable[[int, int], None] | None = None,
    dali: bool = False,
    stopped: str = "stopped while evaluating",
) -> tuple[Records, int]:
    """Return the model's scores of each image, and the number of its outputs that compete.

    view: of the images. See `evaluate` for the rest.
    """
    pieces = [piece.taken(piece.ok) for piece in eval_set.pieces]
    total = sum(map(len, pieces))
    if not total:
        raise DataError(f"{eval_set.name}: no readable image to evaluate a model on (--suite)")
    poll = _Poll(stopped)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count * distributed.world(), total)
        if progress is not None:
            progress(done, total)

    scorer = _Scorer(
        model,
        eval_set,
        view,
        _transforms(corruption),
        batch_size,
        workers,
        device,
        advance,
        dali,
        poll,
    )
    was_training = isinstance(model, torch.nn.Module) and model.training
    if isinstance(model, torch.nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            scores = [scorer.scores(piece) for piece in pieces]
            poll.end()
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(was_training)
    records = _records(eval_set, pieces, scores)
    if eval_set.columns is not None:
        return records, len(eval_set.columns)
    return records, scorer.all_num_outputs()


@dataclass
class _Scorer:
    """Computes `image_scores` of pieces; the fields are the arguments of `records_of`."""

    model: Model
    eval_set: EvalSet
    view: View
    transforms: Sequence[Transform]
    batch_size: int
    workers: int
    device: torch.device
    advance: Callable[[int], None]
    dali: bool
    poll: _Poll
    num_outputs: int = 0

    def scores(self, piece: Subset) -> Tensor:
        """Return the scores of all images of `piece`, float64 [transforms, N, 8] on the CPU."""
        device = self.device
        world = distributed.world()
        columns = _on_device(self.eval_set.columns, device)
        accepted = _on_device(self.eval_set.accepted, device)
        mine = piece.taken(slice(distributed.rank(), None, world))
        keys = torch.from_numpy(mine.rows).to(device)
        found = torch.zeros(
            len(self.transforms), len(piece), len(SCORES), dtype=torch.float64, device=device
        )
        # The other processes fill in the other rows.
        of_mine = found[:, distributed.rank() :: world]
        polls = 0
        pin_memory = device.type == "cuda"
        loader = _loader(self.dali, device)
        batches: Any = iter(loader(mine, self.view, self.batch_size, self.workers, pin_memory))
        # Closes the loader's processes also after a failure or a stop.
        with closing(batches):
            for batch in batches:
                pixels = to_pixels(batch.images.to(device, non_blocking=True))
                labels = batch.labels.to(device, non_blocking=True)
                rows = batch.samples.to(device, non_blocking=True)
                for number, transform in enumerate(self.transforms):
                    logits = self.model(transform(pixels, keys[rows]))
                    self._check(logits)
                    of_mine[number, rows] = image_scores(logits, labels, columns, accepted)
                    self.poll()
                    polls += 1
                self.advance(len(labels))
        # All processes poll as often as the one with the most images.
        largest = -(-len(piece) // world)
        most_polls = -(-largest // self.batch_size) * len(self.transforms)
        for _ in range(most_polls - polls):
            self.poll()
        return distributed.all_reduce_sums(found).cpu()

    def _check(self, logits: Tensor) -> None:
        self.num_outputs = logits.shape[1]
        num_classes = len(self.eval_set.classes)
        if self.num_outputs < num_classes and self.eval_set.known:
            raise DataError(
                f"{self.eval_set.name} has {num_classes} classes, "
                f"the model {self.num_outputs} outputs (--suite)"
            )

    def all_num_outputs(self) -> int:
        """Return the number of outputs on all processes; some may have had no image."""
        if distributed.world() == 1:
            return self.num_outputs
        sums = distributed.all_reduce_sums(torch.tensor([self.num_outputs, self.num_outputs > 0]))
        return int(sums[0] // sums[1])


def _on_device(array: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if array is None else torch.from_numpy(array).to(device)


class _Poll:
    """Raises the stop request of any process in all of them; each must poll equally often."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._vote = distributed.Vote()

    def __call__(self) -> None:
        self._raise(self._vote(asked()))

    def end(self) -> None:
        self._raise(self._vote.settle())

    def _raise(self, stop: type[DadFastError] | None) -> None:
        if stop is not None:
            raise stop(self._words)


def _loader(dali: bool, device: torch.device) -> Callable[..., EvalLoader]:
    if not dali:
        return EvalLoader
    # An optional package.
    from dad_fast.data.loaders.dali.evaluation import DaliEvalLoader

    return partial(DaliEvalLoader, device=device)


def _records(eval_set: EvalSet, pieces: Sequence[Subset], scores: Sequence[Tensor]) -> Records:
    """Concatenate the rows of all pieces and transforms, part by part."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
    part = 0
    for piece, images, found in zip(pieces, image_numbers(pieces), scores, strict=True):
        label = eval_set.output_of(piece.labels)
        for of_transform in found.numpy():
            values = (images, np.full(len(images), part), label, *of_transform.T)
            for name, value in zip(FIELDS, values, strict=True):
                columns[name].append(value)
            part += 1
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    return Records(eval_set.fingerprint, arrays)


def _transforms(corruption: Corruption | None) -> list[Transform]:
    """Return the identity, or the corruption at its severities."""
    if corruption is None:
        return [lambda pixels, keys: pixels]
    name, severity = corruption
    severities = [severity] if severity is not None else range(1, num_severities(name) + 1)

    def at(severity: int) -> Transform:
        return lambda pixels, keys: corrupt(name, pixels, severity, keys)

    return [at(severity) for severity in severities]


def protocol(eval_set: EvalSet, view: View) -> str:
    """Describe the preprocessing of an image, followed by the note of the suite."""
    size, crop_pct, interpolation, squashed = view
    how = "squash to" if squashed else "resize"
    steps = f"{how} {math.floor(size / crop_pct)} {interpolation}, crop {size}"
    if eval_set.parts:
        name = next(name for name, fixed in C_VIEWS.items() if fixed == eval_set.view)
        if name == "none" and size == C_SIDE:
            steps = "224 px as they are"
        steps = f"c-preprocessing {name}: {steps}"
    return "; ".join(filter(None, (steps, eval_set.note)))


def _corruption_facts(eval_set: EvalSet, records: Records) -> dict[str, Any]:
    """Return the mCE with its interval, and accuracy and error of each corruption.

    eval_set: a suite of corrupted copies.
    """
    parts = [records.part(number) for number in range(len(eval_set.parts))]
    top1 = [100 * float(part["correct"].mean()) for part in parts]
    by_name, weights = corruption_summary(eval_set, top1)
    errors = corruption_errors(
        {name: values for name, values in by_name.items() if len(values) == 5}
    )
    by_corruption = {
        name: {"top1": values, "ce": errors.get(name)} for name, values in by_name.items()
    }
    found: dict[str, Any] = {"by_corruption": by_corruption, "by_severity": ()}
    if weights is None:
        return found
    # All images, unless a file is unreadable in some part.
    shared = reduce(np.intersect1d, [part["image"] for part in parts])
    wrong = np.stack(
        [1 - part["correct"][np.isin(part["image"], shared)] for part in parts]
    )  # [P, N]
    # The mCE of a resample is the mean of what its images add, whichever are in it.
    interval = mean_interval(100 * weights @ wrong) if len(shared) else None
    return found | {
        "mce": float(np.mean([errors[name] for name in alexnet_errors()])),
        "mce_interval": interval,
    }
