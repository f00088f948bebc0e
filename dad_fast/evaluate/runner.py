"""Judges a model on a suite: every readable image once, on any number of processes; scores on the device, one read at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.base import Source
from dad_fast.distributed import process_group as distributed
from dad_fast.distributed.signals import asked
from dad_fast.errors import DadFastError, DataError
from dad_fast.evaluate.corruptions.common import corrupt, num_severities
from dad_fast.evaluate.metrics.image_scores import SCORES, image_scores
from dad_fast.evaluate.metrics.intervals import mean_interval
from dad_fast.evaluate.metrics.predictions import FIELDS, Records
from dad_fast.evaluate.metrics.result import Result, make_result
from dad_fast.evaluate.suites.base import (
    EvalSet,
    Subset,
    as_eval_set,
    corruption_summary,
    image_numbers,
)
from dad_fast.evaluate.suites.imagenet import alexnet_errors, corruption_errors
from dad_fast.evaluate.suites.open import Corruption, Suite, open_suites
from dad_fast.evaluate.suites.published import C_SIDE, C_VIEWS

__all__ = ["Result", "Suite", "evaluate", "open_suites", "records_of"]

Model = Callable[[Tensor], Tensor]
Look = Callable[
    [Tensor, Tensor], Tensor
]  # pixels [B, 3, H, W] and the images' keys [B] -> what the model sees


def evaluate(
    model: Model,
    source: Source | EvalSet,
    *,
    img_size: int,
    crop_pct: float,
    interpolation: str,
    batch_size: int,
    workers: int,
    device: torch.device,
    name: str = "",
    corruption: Corruption | None = None,
    progress: Callable[[int, int], None] | None = None,
    dali: bool = False,
    stopped: str = "stopped while judging",
) -> Result:
    """Judge `model`: pixels float32 [B, 3, img_size, img_size] in [0, 1] on `device` -> logits [B, C].

    A module is put in eval mode meanwhile. `progress` gets (images done, images in all). `dali`: DALI decodes, not PIL. With several
    processes all of them must call this, and all get the whole result. Raises DataError where the model has fewer outputs than the
    source has classes, or where no image of it can be read; where a signal has asked a process to stop (`signals.stop_requests` around
    this), Preempted or Interrupted after the next batch, in all of them, with the words `stopped`.
    """
    judged = as_eval_set(source)
    view = (img_size, *(judged.view or (crop_pct, interpolation)))
    records, num_outputs = records_of(
        model, judged, view, batch_size, workers, device, corruption, progress, dali, stopped
    )
    skipped = sum(int((~piece.ok).sum()) for piece in judged.pieces)
    facts: dict[str, Any] = {
        "skipped": skipped,
        "protocol": protocol(judged, view) + "; decoded by DALI" * dali,
    }
    if judged.parts:
        facts |= _corruption_facts(judged, records)
    return make_result(name or judged.name, records, num_outputs, **facts)


def records_of(
    model: Model,
    judged: EvalSet,
    view: tuple[int, float, str],
    batch_size: int,
    workers: int,
    device: torch.device,
    corruption: Corruption | None = None,
    progress: Callable[[int, int], None] | None = None,
    dali: bool = False,
    stopped: str = "stopped while judging",
) -> tuple[Records, int]:
    """What `model` says of each image, and how many of its outputs compete. view: size, share kept and filter of an image."""
    pieces = [piece.taken(piece.ok) for piece in judged.pieces]
    total = sum(map(len, pieces))
    if not total:
        raise DataError(f"{judged.name}: no image to judge a model on (--suite)")
    looks, poll = _looks(corruption), _Poll(stopped)
    done, num_outputs = 0, 0
    was_training = isinstance(model, torch.nn.Module) and model.training
    if isinstance(model, torch.nn.Module):
        model.eval()

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count * distributed.world(), total)
        if progress is not None:
            progress(done, total)

    try:
        with torch.no_grad():
            scores = []
            for piece in pieces:
                found, outputs = _scores(
                    model,
                    judged,
                    piece,
                    view,
                    looks,
                    batch_size,
                    workers,
                    device,
                    advance,
                    dali,
                    poll,
                )
                scores.append(found)
                num_outputs = max(num_outputs, outputs)
            poll.end()
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(was_training)
    if (
        distributed.world() > 1
    ):  # a process may have had no image, where there are fewer than processes
        told = distributed.all_reduce_sums(torch.tensor([num_outputs, num_outputs > 0]))
        num_outputs = int(told[0] // told[1])
    return _records(judged, pieces, scores), len(
        judged.columns
    ) if judged.columns is not None else num_outputs


def _scores(
    model: Model,
    judged: EvalSet,
    piece: Subset,
    view: tuple[int, float, str],
    looks: Sequence[Look],
    batch_size: int,
    workers: int,
    device: torch.device,
    advance: Callable[[int], None],
    dali: bool,
    poll: _Poll,
) -> tuple[Tensor, int]:
    """`image_scores` of all images of `piece`, float64 [looks, N, 8] on the CPU, and the number of the model's outputs."""
    columns, accepted = (
        None if array is None else torch.from_numpy(array).to(device)
        for array in (judged.columns, judged.accepted)
    )
    mine = piece.taken(slice(distributed.rank(), None, distributed.world()))
    keys = torch.from_numpy(mine.rows).to(device)
    found = torch.zeros(len(looks), len(piece), len(SCORES), dtype=torch.float64, device=device)
    of_mine = found[
        :, distributed.rank() :: distributed.world()
    ]  # the other processes fill in the rest
    num_outputs = polls = 0
    batches: Any = iter(
        _loader(dali, device)(mine, *view, batch_size, workers, pin_memory=device.type == "cuda")
    )
    with closing(batches):  # its processes, also when this ends by a failure or a stop
        for batch in batches:
            pixels = to_pixels(batch.images.to(device, non_blocking=True))
            labels, rows = (
                batch.labels.to(device, non_blocking=True),
                batch.samples.to(device, non_blocking=True),
            )
            for number, look in enumerate(looks):
                logits = model(look(pixels, keys[rows]))
                num_outputs = logits.shape[1]
                if num_outputs < len(judged.classes) and judged.known:
                    raise DataError(
                        f"{judged.name} has {len(judged.classes)} classes, the model {num_outputs} outputs (--suite)"
                    )
                of_mine[number, rows] = image_scores(logits, labels, columns, accepted)
                poll()
                polls += 1
            advance(len(labels))
    largest = -(
        -len(piece) // distributed.world()
    )  # share of a process; all poll as often as it takes
    for _ in range(-(-largest // batch_size) * len(looks) - polls):
        poll()
    return distributed.all_reduce_sums(found).cpu(), num_outputs


class _Poll:
    """Raises what a signal has asked any process for: in all of them at once, for each must poll as often as the others."""

    def __init__(self, words: str) -> None:
        self._words, self._vote = words, distributed.Vote()

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
    from dad_fast.data.loaders.dali.evaluation import DaliEvalLoader  # optional

    return partial(DaliEvalLoader, device=device)


def _records(judged: EvalSet, pieces: Sequence[Subset], scores: Sequence[Tensor]) -> Records:
    """The rows of all pieces and looks, part by part."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
    part = 0
    for piece, images, found in zip(pieces, image_numbers(pieces), scores, strict=True):
        label = judged.output_of(piece.labels)
        for look in found.numpy():
            for name, value in zip(
                FIELDS, (images, np.full(len(images), part), label, *look.T), strict=True
            ):
                columns[name].append(value)
            part += 1
    return Records(
        judged.fingerprint, {name: np.concatenate(values) for name, values in columns.items()}
    )


def _looks(corruption: Corruption | None) -> list[Look]:
    """What is judged of each image: itself, or its corrupted versions."""
    if corruption is None:
        return [lambda pixels, keys: pixels]
    name, severity = corruption
    severities = [severity] if severity is not None else range(1, num_severities(name) + 1)
    return [lambda pixels, keys, s=s: corrupt(name, pixels, s, keys) for s in severities]  # type: ignore[misc]


def protocol(judged: EvalSet, view: tuple[int, float, str]) -> str:
    """How an image becomes the model's pixels, and the suite's note, in words."""
    size, crop_pct, interpolation = view
    look = f"resize {math.floor(size / crop_pct)} {interpolation}, crop {size}"
    if judged.parts:
        name = next(name for name, fixed in C_VIEWS.items() if fixed == judged.view)
        look = f"c-preprocessing {name}: {'224 px as they are' if name == 'none' and size == C_SIDE else look}"
    return "; ".join(filter(None, (look, judged.note)))


def _corruption_facts(judged: EvalSet, records: Records) -> dict[str, Any]:
    """mCE with its interval, and accuracy and error of each corruption, of a suite of corrupted copies."""
    parts = [records.part(number) for number in range(len(judged.parts))]
    tops, weights = corruption_summary(
        judged, [100 * float(part["correct"].mean()) for part in parts]
    )
    errors = corruption_errors({name: values for name, values in tops.items() if len(values) == 5})
    by_corruption = {
        name: {"top1": values, "ce": errors.get(name)} for name, values in tops.items()
    }
    found: dict[str, Any] = {"by_corruption": by_corruption, "by_severity": ()}
    if weights is None:
        return found
    shared = reduce(
        np.intersect1d, [part["image"] for part in parts]
    )  # all of them, unless a file is unreadable somewhere
    wrong = np.stack(
        [1 - part["correct"][np.isin(part["image"], shared)] for part in parts]
    )  # [P, N]
    # The mCE of a resample is the mean of what its images add, whichever are in it.
    interval = mean_interval(100 * weights @ wrong) if len(shared) else None
    return found | {
        "mce": float(np.mean([errors[name] for name in alexnet_errors()])),
        "mce_interval": interval,
    }
