"""Averages of the weights of several students: uniform and weighted soups, interpolation.

Soups: Wortsman et al. 2022, arXiv 2203.05482. Interpolation between the weights before and after
fine-tuning (WiSE-FT): Wortsman et al. 2022, arXiv 2109.01903.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.base import Source
from dad_fast.errors import DataError
from dad_fast.evaluation.suites.base import EvalSet, as_eval_set
from dad_fast.models.load_student import load_student, take_view
from dad_fast.models.places import checkpoint_file, run_settings
from dad_fast.models.student import Student
from dad_fast.models.weights.declared import CLASSES, recorded_classes
from dad_fast.models.weights.files import load_strictly, sha256_file

# Images for the statistics of batch norm.
NUM_IMAGES = 4096


@dataclass(frozen=True, eq=False)
class Member:
    """A student to average. name: as typed."""

    name: str
    student: Student
    metadata: Mapping[str, str]
    classes: ClassMap
    sha256: str

    @classmethod
    def load(cls, name: str) -> Member:
        """Load a run's folder, a checkpoint's folder or a file. Raises DataError."""
        path = checkpoint_file(name)
        student, metadata = load_student(path)
        # A temperature belongs to its own weights.
        student.calibration = None
        take_view(student, run_settings(path)[0])
        classes = recorded_classes(path, metadata.get(CLASSES), student.num_classes)
        return cls(name, student, metadata, classes, sha256_file(path))


def check_alike(members: Sequence[Member]) -> None:
    """Raise DataError, with the difference, unless all have one architecture, view and class list."""
    first = members[0]
    for other in members[1:]:
        if first.classes.folders != other.classes.folders:
            pairs = zip(first.classes.folders, other.classes.folders, strict=False)
            place = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
            what = f"{len(first.classes):,} and {len(other.classes):,} classes"
            if place is not None:
                ours, theirs = first.classes.folders[place], other.classes.folders[place]
                what = f"class {place} is {ours!r} and {theirs!r}"
            raise DataError(f"{first.name} and {other.name} have other class lists: {what}")
        for key in sorted(first.student.spec.keys() | other.student.spec.keys()):
            values = first.student.spec.get(key), other.student.spec.get(key)
            if values[0] != values[1]:
                raise DataError(
                    f"{first.name} and {other.name} are no two sets of weights of one model: "
                    f"{key} is {values[0]} and {values[1]}"
                )


def mean_weights(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts, summed in float64, in the dtypes of the first.

    weights: add up to 1. Integers, such as the number of batches of a batch norm, are the first's.
    """
    mean = {}
    for key, first in states[0].items():
        if not first.is_floating_point():
            mean[key] = first
            continue
        terms = [
            weight * state[key].double() for state, weight in zip(states, weights, strict=True)
        ]
        mean[key] = torch.stack(terms).sum(dim=0).to(first.dtype)
    return mean


def average(members: Sequence[Member], weights: Sequence[float]) -> Student:
    """Return a student with the weighted mean of the members' weights and batch-norm statistics."""
    made = copy.deepcopy(members[0].student)
    states = [member.student.contents()[0] for member in members]
    load_strictly(made.model, mean_weights(states, weights), "the average")
    return made


def estimate_batch_norm(
    student: Student, source: Source | EvalSet, batch_size: int, workers: int, device: torch.device
) -> int:
    """Replace the running statistics of batch norm by those over images of `source`, as evaluation
    sees them. Returns the number of images.

    A random sample of at most NUM_IMAGES images: batches of one class would have other statistics.
    """
    images = as_eval_set(source).pieces[0]
    images = images.taken(images.ok)
    chosen = np.random.default_rng(0).permutation(len(images))[:NUM_IMAGES]
    # Whole batches: every batch has the same weight.
    size = min(batch_size, len(chosen))
    chosen = chosen[: len(chosen) // size * size]

    def batches() -> Iterator[Tensor]:
        for batch in EvalLoader(images.taken(chosen), student.view, size, workers):
            yield to_pixels(batch.images.to(device))

    update_bn(batches(), student)
    student.eval()
    return len(chosen)
