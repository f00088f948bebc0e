"""Image sets that `dad-fast analyze` compares, and their features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.config.schema import Config
from dad_fast.data.augment.mixing import soft_targets, to_pixels
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.subset import Subset
from dad_fast.discretizers.base import Discretizer
from dad_fast.errors import UsageError
from dad_fast.evaluation.corruptions.common import corrupt
from dad_fast.evaluation.corruptions.names import num_severities
from dad_fast.evaluation.suites.base import as_eval_set
from dad_fast.evaluation.suites.open import Suite
from dad_fast.keyed_random import sample_seeds
from dad_fast.methods.attack import PGD, perturb
from dad_fast.models.probe import Probe
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher
from dad_fast.models.timm_teacher import PreLogits

# Titles of the sets in tables; the keys are their names in files.
TITLES = {
    "clean": "clean",
    "q_clean": "Q(clean)",
    "random_q": "random + Q",
    "dat": "DAT",
    "dad": "DAD",
}
# Of these sets the loss counts only images that the teacher still classifies as their label.
FILTERED = ("q_clean", "random_q", "dad")
EXAMPLES = 8  # images of a sheet
THUMBNAIL = 32  # largest side in pixels of images that are compared as pixels

Progress = Callable[[int, int], None]
Features = Callable[[Tensor], Tensor]  # pixels [B, 3, H, W] in [0, 1] -> [B, F]


def feature_space(name: str, teacher: Teacher, student: Student | None) -> Features:
    """Return the map from pixels to the space in which distances are measured.

    teacher  features of the teacher's image encoder, normalised to length 1
    student  features before the student's classifier, normalised to length 1
    pixels   images of at most THUMBNAIL a side, divided by the root of their number of values: a
             distance is a root mean square

    Raises UsageError for "student" without a student.
    """
    if name == "pixels":
        return thumbnails
    if name == "teacher":
        return lambda pixels: F.normalize(teacher.features(pixels).double(), dim=1)
    if student is None:
        raise UsageError(
            "--features student: no student is named; name a run's folder, or add --init-from RUN"
        )
    if isinstance(student, Probe):
        return lambda pixels: F.normalize(student.features(pixels).double(), dim=1)
    before_head = PreLogits(student.model)
    return lambda pixels: F.normalize(
        before_head((pixels - student.mean) / student.std).double(), dim=1
    )


def thumbnails(pixels: Tensor) -> Tensor:
    side = min(THUMBNAIL, *pixels.shape[-2:])
    small = F.interpolate(pixels, (side, side), mode="area").double().flatten(1)
    return small / small.shape[1] ** 0.5


@dataclass(frozen=True)
class ImageSet:
    """N images in random order, on the host; image i of every generated set is made from the same
    clean image.
    """

    features: Tensor  # float64 [N, F], see `feature_space`
    predicted: Tensor  # int64 [N], the teacher's class
    labels: Tensor  # int64 [N]
    # float32 [N], share of codes that differ from those of Q(clean); None for sets without codes.
    changed: Tensor | None = None
    examples: Tensor | None = None  # float32 [EXAMPLES, 3, H, W], the first images

    def counted(self, filtered: bool) -> Tensor:
        """Return features [M, F] of the images that the loss counts: all, or those that the teacher
        classifies as their label.
        """
        return self.features[self.predicted == self.labels] if filtered else self.features


class Made(NamedTuple):
    images: Tensor  # [B, 3, H, W]
    changed: Tensor | None  # [B]


class Generators:
    """Make every set that these models allow from clean images; DAT's needs a student to attack."""

    def __init__(
        self, cfg: Config, teacher: Teacher, discretizer: Discretizer, student: nn.Module | None
    ) -> None:
        self.discretizer, self.order, self.precision = discretizer, cfg.attack.order, cfg.precision
        self.student, self.num_classes = student, teacher.num_classes
        attack = PGD.from_config(cfg.attack)
        start_alone = replace(attack, steps=0, random_start=1.0)
        self.attacks: dict[str, tuple[PGD, Callable[[Tensor], Tensor]]] = {
            "random_q": (start_alone, teacher)
        }
        if student is not None:
            self.attacks["dat"] = (attack, self._student)
        self.attacks["dad"] = (attack, teacher)

    @property
    def names(self) -> list[str]:
        return ["clean", "q_clean", *self.attacks]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Made]:
        """pixels [B, 3, H, W] in [0, 1]; labels, keys int64 [B]."""
        plain = self.discretizer(pixels)
        made = {"clean": Made(pixels, None), "q_clean": Made(plain.images, None)}
        targets, unmoved = soft_targets(labels, self.num_classes), plain.codes
        for name, (attack, model) in self.attacks.items():
            base, perturbed = perturb(
                self.discretizer, model, attack, pixels, targets, keys, self.order
            )
            # The authors' order without a perturbation gives Q(Q(x)).
            if base is not pixels and name == "random_q":
                unmoved = self.discretizer(base).codes
            found = self.discretizer(perturbed)
            changed = None
            if found.codes is not None and unmoved is not None:
                changed = (found.codes != unmoved).float().flatten(1).mean(dim=1)
            made[name] = Made(found.images, changed)
        return made

    def _student(self, pixels: Tensor) -> Tensor:
        assert self.student is not None
        if isinstance(self.student, Probe):  # its forward keeps no gradient
            return self.student.logits(self.student.encoder.features(pixels))
        dtype = getattr(torch, self.precision.student)
        with torch.autocast(pixels.device.type, dtype, enabled=bool(self.precision.amp)):
            logits: Tensor = self.student(pixels)
        return logits


def make_sets(
    cfg: Config,
    source: Subset,
    teacher: Teacher,
    features: Features,
    generators: Generators,
    view: View,
    device: torch.device,
    progress: Progress,
) -> dict[str, ImageSet]:
    """Make every set from the images of `source`, which are in random order; noise as in the first
    training epoch.
    """
    gathered: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {
        name: [] for name in generators.names
    }
    examples: dict[str, Tensor] = {}
    labels = []
    for pixels, batch_labels, rows in _batches(cfg, source, view, device, progress):
        labels.append(batch_labels.cpu())
        keys = torch.from_numpy(sample_seeds(cfg.seed, 0, rows.cpu().numpy())).to(device)
        for name, made in generators(pixels, batch_labels, keys).items():
            examples.setdefault(name, made.images[:EXAMPLES].float().cpu())
            with torch.no_grad():
                found = features(made.images).cpu()
                predicted = teacher(made.images).argmax(dim=1).cpu()
            changed = None if made.changed is None else made.changed.cpu()
            gathered[name].append((found, predicted, changed))

    all_labels = torch.cat(labels)
    sets = {}
    for name, parts in gathered.items():
        all_features, all_predicted, all_changed = zip(*parts, strict=True)
        shares = [share for share in all_changed if share is not None]
        sets[name] = ImageSet(
            torch.cat(all_features),
            torch.cat(all_predicted),
            all_labels,
            torch.cat(shares) if shares else None,
            examples[name],
        )
    return sets


@torch.no_grad()
def suite_features(
    cfg: Config,
    suite: Suite,
    num_images: int,
    features: Features,
    view: View,
    device: torch.device,
    progress: Progress,
) -> Tensor:
    """Return features of a random choice of a suite's images, in random order; float64 [N, F].

    With a corruption at all severities, each image gets one of them.
    """
    eval_set = as_eval_set(suite.source)
    sizes = [len(piece) for piece in eval_set.pieces]
    chosen = choice(np.concatenate([piece.ok for piece in eval_set.pieces]), num_images, cfg.seed)
    view = eval_set.view_for(view)
    found: list[Tensor] = []
    places: list[np.ndarray] = []
    first = 0
    for piece, size in zip(eval_set.pieces, sizes, strict=True):
        mine = np.flatnonzero((chosen >= first) & (chosen < first + size))
        part = piece.taken(chosen[mine] - first)
        first += size
        places.append(mine)
        for pixels, _, rows in _batches(cfg, part, view, device, progress):
            found.append(features(_corrupted(suite, pixels, rows)).cpu())
    return torch.cat(found)[np.argsort(np.concatenate(places))]


def choice(ok: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Return the positions of `num` true entries, or of all, in random order; int64."""
    return np.random.default_rng(seed).permutation(np.flatnonzero(ok))[:num]


def _batches(
    cfg: Config, piece: Subset, view: View, device: torch.device, progress: Progress
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield pixels [B, 3, H, W] in [0, 1], labels and rows of the whole source (int64 [B]) of a
    fully readable piece.
    """
    size = cfg.eval.batch_size or cfg.data.batch_size
    loader = EvalLoader(piece, view, size, cfg.data.workers, pin_memory=device.type == "cuda")
    done = 0
    for batch in loader:
        rows = torch.from_numpy(piece.rows)[batch.samples]
        yield (
            to_pixels(batch.images.to(device, non_blocking=True)),
            batch.labels.to(device),
            rows.to(device),
        )
        done += len(batch.labels)
        progress(done, loader.num_images)


def _corrupted(suite: Suite, pixels: Tensor, keys: Tensor) -> Tensor:
    """Apply the suite's corruption as in evaluation, where the key of an image is its row."""
    if suite.corruption is None:
        return pixels
    name, severity = suite.corruption
    if severity is not None:
        return corrupt(name, pixels, severity, keys)
    result, count = torch.empty_like(pixels), num_severities(name)
    for one in range(count):
        rows = keys % count == one
        if rows.any():
            result[rows] = corrupt(name, pixels[rows], one + 1, keys[rows])
    return result


def moves(
    before: Tensor, after: Tensor, names: Sequence[str], most: int = 10
) -> list[tuple[str, str, int]]:
    """Return the most frequent changes of the teacher's class from `before` to `after` (int64 [N]):
    (from, to, images).
    """
    moved = before != after
    pairs, counts = torch.stack((before[moved], after[moved])).unique(dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most].tolist()
    return [(names[int(pairs[0, i])], names[int(pairs[1, i])], int(counts[i])) for i in order]
