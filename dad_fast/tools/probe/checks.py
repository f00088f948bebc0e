"""Checks of linear probes of `--method lp-clip` besides accuracy: latent organisation, few labels,
epistemic uncertainty.

    python -m dad_fast.tools.probe.checks RUN... [--suite NAME ...] [--labels 1,5,20] [--draws 5] [--json FILE]

Every RUN is a run's folder; several runs with different seeds form an ensemble. The encoder runs
once over the training images and each suite (by default those of the first run); everything else is
computed on features.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dad_fast.config.schema import Config
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.splits import open_split
from dad_fast.distributed.device import resolve_device
from dad_fast.engine import frozen
from dad_fast.engine.choices import settle
from dad_fast.errors import UsageError, program
from dad_fast.evaluation.corruptions.common import corrupt
from dad_fast.evaluation.corruptions.names import num_severities
from dad_fast.evaluation.metrics.ood_detection import metrics
from dad_fast.evaluation.suites.base import EvalSet, as_eval_set
from dad_fast.evaluation.suites.open import Suite, open_suites
from dad_fast.files import atomic_write_json
from dad_fast.loggers.environment import environment
from dad_fast.loggers.run_log import print_line
from dad_fast.models.load_student import load_student, take_view
from dad_fast.models.places import checkpoint_file, run_settings
from dad_fast.models.probe import Probe
from dad_fast.models.weights.declared import check_encoder
from dad_fast.tools.probe.measures import (
    class_means,
    few_labels,
    nearest_mean,
    silhouette,
    uncertainty,
)

STRENGTH = 1e-4  # of `few_labels`; chosen on the validation split of the embedded digits
MOST_TRAINING_IMAGES = 50_000  # for class means and few labels
MOST_SILHOUETTE = 10_000  # images of a suite; the cost is quadratic


class Seen(NamedTuple):
    """Features of a suite's images."""

    features: Tensor  # float32 [N, F]
    labels: Tensor  # int64 [N], places among `outputs`
    outputs: Tensor  # int64 [K], the classes that compete


class Few(NamedTuple):
    """Few-label settings: numbers of labels a class, number of draws, seed of the draws."""

    counts: tuple[int, ...]
    draws: int
    seed: int


class Checker:
    """The probes of several runs on one encoder."""

    def __init__(self, runs: Sequence[str]) -> None:
        """Load the probes and their encoder.

        Raises UsageError for runs without settings or with different encoders.
        """
        self.probes = [_load(run) for run in runs]
        spec = self.probes[0].spec
        cfg, _ = run_settings(checkpoint_file(runs[0]))
        if cfg is None or not cfg.data.data_dir:
            raise UsageError(
                f"{runs[0]}: no config.toml with --data-dir next to its model; name a run's folder"
            )
        for run, probe in zip(runs, self.probes, strict=True):
            check_encoder(run, probe.spec, spec["encoder_sha256"])
        self.device = resolve_device("auto")
        self.cfg: Config = settle(cfg, self.device)
        take_view(self.probes[0], cfg)
        self.source = open_split(cfg.data, cfg.data.train_split)
        self.classes: ClassMap = self.source.classes
        loaded = frozen.teacher(self.cfg, self.classes, self.device)
        self.teacher = loaded.model
        check_encoder(runs[0], spec, loaded.encoder_fingerprint)
        self.heads = [
            (probe.model.weight.detach(), probe.model.bias.detach()) for probe in self.probes
        ]

    @torch.no_grad()
    def see(self, suite: Suite, most: int = 0) -> Seen:
        """Compute features of all images of a suite (every severity of a corruption), or of `most`
        evenly spread images.
        """
        eval_set: EvalSet = as_eval_set(suite.source)
        if eval_set.accepted is not None:
            raise UsageError(
                f"--suite {suite.name}: its images may have several classes, which these checks do "
                "not support; leave it out"
            )
        probe, cfg = self.probes[0], self.cfg
        view = eval_set.view_for(probe.view)
        features, labels = [], []
        print_line(f"features of {suite.name}")
        for piece in eval_set.pieces:
            piece = piece.taken(piece.ok)
            if most and len(piece) > most:
                piece = piece.taken(np.linspace(0, len(piece) - 1, most).round().astype(np.int64))
            keys = torch.from_numpy(piece.rows)
            batch_size = cfg.eval.batch_size or cfg.data.batch_size
            for batch in EvalLoader(piece, view, batch_size, cfg.data.workers):
                pixels = to_pixels(batch.images.to(self.device))
                rows = keys[batch.samples].to(self.device)
                for one in _variants(suite, pixels, rows):
                    features.append(self.teacher.features(one).cpu())
                    labels.append(batch.labels)
        columns = np.arange(len(self.classes)) if eval_set.columns is None else eval_set.columns
        return Seen(torch.cat(features), torch.cat(labels), torch.from_numpy(columns))

    def check(self, suites: Sequence[Suite], few: Few) -> dict[str, Any]:
        """Compute the record: the results by suite, and the settings."""
        train = self.see(Suite(self.cfg.data.train_split, self.source), MOST_TRAINING_IMAGES)
        means = class_means(train.features, train.labels, len(self.classes))
        drawn = list(_drawn(train.labels, len(self.classes), few))
        tuned = {
            k: [self._tuned(train, rows) for count, rows in drawn if count == k] for k in few.counts
        }
        found: dict[str, Any] = {}
        epistemic: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for suite in suites:
            seen = self.see(suite)
            outputs = [_log_probabilities(seen, head) for head in self.heads]
            nearest = nearest_mean(seen.features, means[seen.outputs])
            row: dict[str, Any] = {
                "num_images": len(seen.labels),
                "zero_shot": _accuracy(self._zero_shot(seen), seen.labels),
                "probe": [_accuracy(one, seen.labels) for one in outputs],
                "nearest_class_mean": 100 * (nearest == seen.labels).double().mean().item(),
            }
            num = len(seen.labels)
            some = np.linspace(0, num - 1, min(num, MOST_SILHOUETTE)).round().astype(np.int64)
            row["silhouette"] = silhouette(seen.features[some], seen.labels[some])
            row["few_labels"] = {
                str(k): {
                    start: [
                        _accuracy(_log_probabilities(seen, heads[start]), seen.labels)
                        for heads in per_draw
                    ]
                    for start in ("probe", "zeros")
                }
                for k, per_draw in tuned.items()
            }
            if len(outputs) > 1:
                total, aleatoric, own = uncertainty(torch.stack(outputs))
                row["uncertainty"] = {
                    "total": total.mean().item(),
                    "aleatoric": aleatoric.mean().item(),
                    "epistemic": own.mean().item(),
                }
                epistemic[suite.name] = own.numpy(), total.numpy()
                known = epistemic[suites[0].name]
                if suite is not suites[0]:
                    scores = {"epistemic": 0, "total": 1}
                    row["uncertainty"]["auroc"] = {
                        n: metrics(-known[i], -epistemic[suite.name][i])["auroc"]
                        for n, i in scores.items()
                    }
            found[suite.name] = row
        return {
            "teacher": self.teacher.name,
            "probes": len(self.probes),
            "data_dir": self.cfg.data.data_dir,
            "train": {"split": self.cfg.data.train_split, "num_images": len(train.labels)},
            "few_labels": {"strength": STRENGTH, "draws": few.draws, "seed": few.seed},
            "suites": found,
        }

    def _tuned(self, train: Seen, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Fit the first probe and a new linear layer to the training images `rows`."""
        weight, bias = self.heads[0]
        features, labels = train.features[rows], train.labels[rows]
        zeros = torch.zeros_like(weight), torch.zeros_like(bias)
        return {
            "probe": few_labels(features, labels, weight, bias, STRENGTH),
            "zeros": few_labels(features, labels, *zeros, STRENGTH),
        }

    def _zero_shot(self, seen: Seen) -> Tensor:
        """Log-probabilities of the teacher's own head; NaN for an encoder without one, and for a
        timm teacher, whose head needs more than features.
        """
        if self.teacher.whole is not None or not self.teacher.has_head:
            return torch.full((len(seen.labels), len(seen.outputs)), torch.nan)
        return _log_probabilities(
            seen, (self.teacher.head_weight.cpu(), self.teacher.head_bias.cpu())
        )


def _load(run: str) -> Probe:
    probe, _ = load_student(run)
    if not isinstance(probe, Probe):
        raise UsageError(f"{run}: not a linear probe; name runs of --method lp-clip")
    return probe


def _variants(suite: Suite, pixels: Tensor, keys: Tensor) -> list[Tensor]:
    """Return the images as the suite shows them: as they are, or corrupted at each of its
    severities.
    """
    if suite.corruption is None:
        return [pixels]
    name, severity = suite.corruption
    severities = [severity] if severity is not None else range(1, num_severities(name) + 1)
    return [corrupt(name, pixels, one, keys) for one in severities]


def _drawn(labels: Tensor, num_classes: int, few: Few) -> list[tuple[int, Tensor]]:
    """Draw (count, rows int64) for each count and draw: that many random samples of every class, or
    all of a smaller class.
    """
    found = []
    for draw in range(few.draws):
        random = np.random.default_rng((few.seed, draw))
        order = torch.from_numpy(random.permutation(len(labels)))
        # Number of samples of the same class before each sample in that order.
        rank = torch.zeros(len(labels), dtype=torch.int64)
        for number in range(num_classes):
            members = order[labels[order] == number]
            rank[members] = torch.arange(len(members))
        found += [(count, (rank < count).nonzero().flatten()) for count in few.counts]
    return found


def _log_probabilities(seen: Seen, head: tuple[Tensor, Tensor]) -> Tensor:
    """Return log-probabilities over the classes that compete, float64 [N, K]."""
    weight, bias = (tensor.double()[seen.outputs] for tensor in head)
    return F.linear(seen.features.double(), weight, bias).log_softmax(dim=1)


def _accuracy(scores: Tensor, labels: Tensor) -> float | None:
    """Return the accuracy in percent; None if the scores are NaN."""
    if scores.isnan().all():
        return None
    return 100 * (scores.argmax(dim=1) == labels).double().mean().item()


def markdown(record: dict[str, Any]) -> str:
    """Format the tables: features, few labels, and with several probes their uncertainty."""
    suites, counts = record["suites"], list(next(iter(record["suites"].values()))["few_labels"])
    lines = _table(
        ["", "images", "zero-shot", "probe", "nearest class mean", "silhouette"],
        [
            [
                name,
                f"{row['num_images']:,}",
                *(_text(row["zero_shot"]), _spread(row["probe"])),
                *_latent(row),
            ]
            for name, row in suites.items()
        ],
    )
    lines += [
        "",
        *_table(
            ["", "0", *(f"{k}, {start}" for k in counts for start in ("probe", "new"))],
            [
                [
                    name,
                    _text(row["probe"][0]),
                    *(
                        _spread(row["few_labels"][k][start])
                        for k in counts
                        for start in ("probe", "zeros")
                    ),
                ]
                for name, row in suites.items()
            ],
        ),
    ]
    if all("uncertainty" in row for row in suites.values()):
        rows = []
        for name, row in suites.items():
            found = row["uncertainty"]
            auroc = found.get("auroc", {"epistemic": None, "total": None})
            values = (f"{found[key]:.4f}" for key in ("total", "aleatoric", "epistemic"))
            rows.append([name, *values, _text(auroc["epistemic"]), _text(auroc["total"])])
        lines += [
            "",
            *_table(
                ["", "total", "aleatoric", "epistemic", "AUROC by epistemic", "AUROC by total"],
                rows,
            ),
        ]
    return "\n".join(lines)


def _latent(row: dict[str, Any]) -> tuple[str, str]:
    return _text(row["nearest_class_mean"]), f"{row['silhouette']:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|---" + "|---:" * (len(header) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


@program
def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dad_fast.tools.probe.checks",
        description="Checks of linear probes on features.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder; several form an ensemble"
    )
    parser.add_argument(
        "--suite",
        nargs="+",
        default=[],
        metavar="NAME",
        help="as in dad-fast eval; the first is the in-distribution one",
    )
    parser.add_argument(
        "--labels", default="1,5,20", help="labels a class for fine-tuning (default: %(default)s)"
    )
    parser.add_argument(
        "--draws", type=int, default=5, help="number of draws (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--json", default="", metavar="FILE", help="also write the record to FILE")
    given = parser.parse_args(arguments)
    if (
        not all(part.isdecimal() and int(part) > 0 for part in given.labels.split(","))
        or given.draws < 1
        or given.seed < 0
    ):
        raise UsageError(
            "--labels and --draws are whole numbers above 0, such as --labels 1,5,20 --draws 5, "
            "--seed 0 or more"
        )
    if given.json and not Path(given.json).absolute().parent.is_dir():
        raise UsageError(f"--json {given.json}: name a file in a folder that exists")
    checker = Checker(given.runs)
    cfg = checker.cfg
    typed = [part for name in given.suite for part in name.split(",") if part]
    suites = open_suites(
        typed or cfg.eval.suites or (cfg.data.val_split,), cfg.data, checker.classes, cfg.eval
    )
    record = checker.check(
        suites, Few(tuple(int(part) for part in given.labels.split(",")), given.draws, given.seed)
    )
    print(markdown(record))
    if given.json:
        atomic_write_json(given.json, {**record, "environment": environment()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
