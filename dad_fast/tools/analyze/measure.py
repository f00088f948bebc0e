"""The sets of images that `dad-fast analyze` compares, as a model sees them."""

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
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.discretizers.base import Discretizer
from dad_fast.errors import UsageError
from dad_fast.evaluate.corruptions.common import corrupt, num_severities
from dad_fast.evaluate.suites.base import Subset, as_eval_set
from dad_fast.evaluate.suites.registry import Suite
from dad_fast.keyed_random import sample_seeds
from dad_fast.methods.attack import PGD, perturb
from dad_fast.models.probe import Probe
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher, _PreLogits

# What each set is called in tables; its name in files is the key.
TITLES = {
    "clean": "clean",
    "q_clean": "Q(clean)",
    "random_q": "random + Q",
    "dat": "DAT",
    "dad": "DAD",
}
FILTERED = (
    "q_clean",
    "random_q",
    "dad",
)  # the loss counts these where the teacher still says the label
EXAMPLES = 8  # images of a sheet
THUMBNAIL = 32  # pixels a side, at most, of images that are compared as they are

View = tuple[int, float, str]  # side in pixels, share kept, filter
Progress = Callable[[int, int], None]
Features = Callable[[Tensor], Tensor]  # pixels [B, 3, H, W] in [0, 1] -> [B, F]


def feature_space(name: str, teacher: Teacher, student: Student | None) -> Features:
    """Where distances are measured: the features of the teacher's image encoder, those before the student's classifier, each of length 1,
    or the pixels themselves, shrunk to THUMBNAIL a side and divided by the root of their number, so that a distance is a root mean square.

    Raises UsageError where there is no student.
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
    before_head = _PreLogits(student.model)
    return lambda pixels: F.normalize(
        before_head((pixels - student.mean) / student.std).double(), dim=1
    )


def thumbnails(pixels: Tensor) -> Tensor:
    side = min(THUMBNAIL, *pixels.shape[-2:])
    small = F.interpolate(pixels, (side, side), mode="area").double().flatten(1)
    return small / small.shape[1] ** 0.5


@dataclass(frozen=True)
class ImageSet:
    """A set of N images, in random order; image i of every generated set is made from the same clean image. On the host."""

    features: Tensor  # float64 [N, F], see `feature_space`
    said: Tensor  # int64 [N], the teacher's class
    labels: Tensor  # int64 [N]
    changed: Tensor | None = (
        None  # float32 [N], share of codes that are not Q(clean)'s; None where there are none
    )
    examples: Tensor | None = None  # float32 [EXAMPLES, 3, H, W], the first images

    def counted(self, filtered: bool) -> Tensor:
        """Features of the images that the loss counts: all, or those that the teacher gives their label. [M, F]"""
        return self.features[self.said == self.labels] if filtered else self.features


class Made(NamedTuple):
    images: Tensor  # [B, 3, H, W]
    changed: Tensor | None  # [B]


class Generators:
    """Clean images -> every set that these models can make: DAT's needs a student to attack."""

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
            if (
                base is not pixels and name == "random_q"
            ):  # Q(Q(x)): what the authors' order gives without a perturbation
                unmoved = self.discretizer(base).codes
            found = self.discretizer(perturbed)
            changed = None
            if found.codes is not None and unmoved is not None:
                changed = (found.codes != unmoved).float().flatten(1).mean(dim=1)
            made[name] = Made(found.images, changed)
        return made

    def _student(self, pixels: Tensor) -> Tensor:
        assert self.student is not None
        if isinstance(self.student, Probe):  # whose own forward keeps no gradient
            return self.student.logits(self.student.encoder.features(pixels))
        with torch.autocast(
            pixels.device.type, getattr(torch, self.precision.student), enabled=self.precision.amp
        ):
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
    """Every set made from the images of `source`, which are in random order; noise as in training's first epoch."""
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
                seen, said = features(made.images).cpu(), teacher(made.images).argmax(dim=1).cpu()
            gathered[name].append(
                (seen, said, None if made.changed is None else made.changed.cpu())
            )
    all_labels, sets = torch.cat(labels), {}
    for name, parts in gathered.items():
        all_seen, all_said, changed = zip(*parts, strict=True)
        shares = (
            torch.cat([share for share in changed if share is not None])
            if changed[0] is not None
            else None
        )
        sets[name] = ImageSet(
            torch.cat(all_seen), torch.cat(all_said), all_labels, shares, examples[name]
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
    """Features of a random choice of a suite's images, in random order; float64 [N, F].

    Under a corruption at all severities each image has one of them.
    """
    judged = as_eval_set(suite.source)
    sizes = [len(piece) for piece in judged.pieces]
    chosen = choice(np.concatenate([piece.ok for piece in judged.pieces]), num_images, cfg.seed)
    view = (view[0], *judged.view) if judged.view else view
    found: list[Tensor] = []
    places: list[np.ndarray] = []
    first = 0
    for piece, size in zip(judged.pieces, sizes, strict=True):
        mine = np.flatnonzero((chosen >= first) & (chosen < first + size))
        part = piece.taken(chosen[mine] - first)
        first += size
        places.append(mine)
        for pixels, _, rows in _batches(cfg, part, view, device, progress):
            found.append(features(_corrupted(suite, pixels, rows)).cpu())
    return torch.cat(found)[np.argsort(np.concatenate(places))]


def choice(ok: np.ndarray, num: int, seed: int) -> np.ndarray:
    """`num` of the numbers of the true entries, or all, in random order; int64."""
    return np.random.default_rng(seed).permutation(np.flatnonzero(ok))[:num]


def _batches(
    cfg: Config, piece: Subset, view: View, device: torch.device, progress: Progress
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pixels [B, 3, H, W] in [0, 1], labels and rows of the whole source int64 [B], of a piece that is wholly readable."""
    size = cfg.eval.batch_size or cfg.data.batch_size
    loader = EvalLoader(piece, *view, size, cfg.data.workers, pin_memory=device.type == "cuda")
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
    """As in evaluation, where the key of an image is its row."""
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
    """The most frequent changes of the teacher's class from `before` to `after`, int64 [N] each: (from, to, images)."""
    moved = before != after
    pairs, counts = torch.stack((before[moved], after[moved])).unique(dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most].tolist()
    return [(names[int(pairs[0, i])], names[int(pairs[1, i])], int(counts[i])) for i in order]
