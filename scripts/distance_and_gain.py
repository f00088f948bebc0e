"""Experiment of docs/analyze.md: do images nearer to a test set help more on it?

    python scripts/distance_and_gain.py runs/distance-and-gain   # 20 minutes of one core; resumes

A generator makes one set of images from the training set: the images themselves, Q(x), Q(x +
noise), DAT's (Q of images that attack a student trained without them) or DAD's. For each set,
students are distilled on clean images and on the set with the same loss, and compared with students
of the same seed distilled on clean images alone. Every set is stored first (8-bit, unaugmented; 5
draws of sets with noise), so students see the measured images. In every set only images count that
the teacher classifies as their label. Distances are measured in three spaces. Writes
OUT/analysis-SPACE (by dad-fast analyze), docs/records/analyze.json, docs/analyze.svg, and the
tables between the marks in docs/analyze.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from show_distance_and_gain import show
from torch import Tensor, nn

from dad_fast.cli.main import main as dad_fast
from dad_fast.config import Config, expand, to_toml
from dad_fast.config.fields import with_values
from dad_fast.config.options import StoreLaunch
from dad_fast.config.resolve import gather
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.loader import EvalLoader
from dad_fast.data.sources.registry import open_source
from dad_fast.evaluation.corruptions.common import corrupt
from dad_fast.evaluation.corruptions.names import STANDARD
from dad_fast.files import atomic_write_text, plain
from dad_fast.loggers.environment import environment
from dad_fast.models.load_student import load_student
from dad_fast.precompute.fill import fill
from dad_fast.precompute.run import make_builder

DOCS = Path(__file__).resolve().parents[1] / "docs"
EPOCHS, DRAWS = 10, 5
# Chosen before any training: the embedded test sets, and every corruption at its worst.
SUITES = ("test", "optdigits", *(f"{name}:5" for name in STANDARD), "invert:1")
# Settings of `dad-fast precompute` for each set. DAT's is made here, because precompute attacks
# teachers.
SETS: dict[str, dict[str, Any]] = {
    "clean": {"discretizer.name": "identity", "attack.steps": 0, "attack.random_start": 0.0},
    "q_clean": {"attack.steps": 0, "attack.random_start": 0.0},
    "random_q": {"attack.steps": 0},
    "dat": {},
    "dad": {},
}
SPACES, MEASURES = ("teacher", "student", "pixels"), ("sw2_squared_corrected", "mmd2")
BOOTSTRAPS = 2000


class AttackedStudent(nn.Module):
    """The student with gradients (the attacked model), the teacher without (the filter)."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student.eval().requires_grad_(False), teacher

    def forward(self, pixels: Tensor) -> Tensor:
        return self.student(pixels) if torch.is_grad_enabled() else self.teacher(pixels)


def settings() -> Config:
    """Return the settings of DAD in the demo, as one run."""
    return with_values(
        expand(gather("demo", None, [], {"method": "dad"}))[0][2],
        {"schedule.epochs": EPOCHS, "eval.every_epochs": 0},
    )


def train(output: Path, seeds: int) -> None:
    """Make every missing store and student."""
    stores, base = output / "stores", output / "base.toml"
    if all(
        (output / name / f"seed-{seed}" / "results.json").exists()
        for seed in range(seeds)
        for name in ("none", *SETS)
    ):
        return
    atomic_write_text(base, to_toml(settings()))
    _do("precompute", base, "--targets", "--views", EPOCHS, "-o", stores / "targets")
    _do(*_student(output, "none", 0))
    for name, values in SETS.items():
        cfg = with_values(settings(), values)
        noisy = bool(cfg.attack.steps or cfg.attack.random_start)
        launch = StoreLaunch(output=str(stores / name), views=DRAWS if noisy else 1, images="raw")
        filler = make_builder(cfg, launch)
        if name == "dat":
            student, _ = load_student(output / "none" / "seed-0" / "model.safetensors")
            filler.teacher = AttackedStudent(student, filler.teacher)  # type: ignore[attr-defined]
        for _ in fill(filler, stores / name, 0, 1):
            pass
    for seed in range(seeds):
        for name in ("none", *SETS):
            _do(*_student(output, name, seed))


def _student(output: Path, name: str, seed: int) -> list[Any]:
    method, store = ("kd", []) if name == "none" else ("dad", [output / "stores" / name])
    command = [
        "train",
        output / "base.toml",
        "--method",
        method,
        "--seed",
        seed,
        "--log-every",
        350,
        "--suite",
        "test",
    ]
    return [
        *command,
        "--store",
        *store,
        output / "stores" / "targets",
        "--resume",
        "auto",
        "-o",
        output / name / f"seed-{seed}",
    ]


def _do(*arguments: Any) -> None:
    if code := dad_fast([str(argument) for argument in arguments]):
        sys.exit(code)


@torch.no_grad()
def evaluate(output: Path, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Return top-1 in % by set, test set and seed.

    All students share one view of each test image.
    """
    cfg = settings()
    students = {
        (name, seed): load_student(output / name / f"seed-{seed}" / "model.safetensors")[0].eval()
        for name in ("none", *SETS)
        for seed in range(seeds)
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ("none", *SETS)}
    for suite in SUITES:
        corruption, _, severity = suite.partition(":")
        loader = EvalLoader(
            open_source(cfg.data.data_dir, "test" if severity else suite),
            View(28, 1.0, "bilinear"),
            250,
            0,
        )
        hits = dict.fromkeys(students, 0)
        for batch in loader:
            pixels = to_pixels(batch.images)
            if severity:
                pixels = corrupt(corruption, pixels, int(severity), batch.samples)
            for key, student in students.items():
                hits[key] += int((student(pixels).argmax(dim=1) == batch.labels).sum())
        for (name, _), count in hits.items():
            found[name].setdefault(suite, []).append(100 * count / loader.num_images)
        print(f"evaluated {len(students)} students on {suite}", flush=True)
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks along the last axis; equal values get their mean rank."""
    less = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return less + (equal - 1) / 2


def within(distance: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation over the generators for each test set; [..., T, G] twice -> [...,
    T].

    0 if all gains are equal.
    """
    a, b = (x - x.mean(-1, keepdims=True) for x in (ranks(distance), ranks(gain)))
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def relation(distance: np.ndarray, gain: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Relate distance [T, G] and gain [T, G, S] of G generators on T test sets, over S seeds.

    rho     mean over test sets of the rank correlation over generators (below 0: nearer sets help
            more), with a 95 % interval by the bootstrap over test sets and seeds
    p       share of all G! permutations of the generators' gains, the same in all test sets, with a
            rho as low: test sets are not independent trials of the generators
    pooled  the rank correlation over all pairs of test set and generator, which also reflects that
            a far test set has more to gain
    """
    num_tests, num_sets, num_seeds = gain.shape
    mean = gain.mean(-1)
    each = within(distance, mean)
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(BOOTSTRAPS):
        tests = random.integers(num_tests, size=num_tests)
        seeds = random.integers(num_seeds, size=num_seeds)
        draws.append(within(distance[tests], gain[tests][:, :, seeds].mean(-1)).mean())
    others = [
        within(distance, mean[:, list(order)]).mean()
        for order in itertools.permutations(range(num_sets))
    ]
    return {
        "rho": each.mean(),
        "interval": list(np.percentile(draws, (2.5, 97.5))),
        "p": float(np.mean(np.array(others) <= each.mean() + 1e-12)),
        "by_test": list(each),
        "pooled": float(within(distance.reshape(1, -1), mean.reshape(1, -1))[0]),
    }


def relate(distances: dict[str, Any], top1: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return the relation in each space for each distance, over all test sets and over those with a
    visible shift.

    A shift is visible if the interval of the distance from clean images is above 0.
    """
    names = list(SETS)
    gains = [
        [np.subtract(top1[name][suite], top1["none"][suite]) for name in names] for suite in SUITES
    ]
    gain: np.ndarray = np.array(gains)  # [T, G, S]
    found: dict[str, Any] = {}
    for space, of_suites in distances.items():
        for measure in MEASURES:
            distance = np.array(
                [[of_suites[suite][name][measure]["value"] for name in names] for suite in SUITES]
            )
            seen = np.array(
                [of_suites[suite]["clean"][measure]["interval"][0] > 0 for suite in SUITES]
            )
            found.setdefault(space, {})[measure] = {
                "all": {**relation(distance, gain), "num_tests": len(SUITES)}
            }
            if seen.any():
                found[space][measure]["seen"] = {
                    **relation(distance[seen], gain[seen]),
                    "num_tests": int(seen.sum()),
                }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    output, start = options.output, time.process_time()
    train(output, options.seeds)
    suites, run = [suite.removesuffix(":1") for suite in SUITES], output / "none" / "seed-0"
    analyses, distances, floors = {}, {}, {}
    for space in SPACES:
        folder = output / f"analysis-{space}"
        what = ["--init-from", run, "--suite", *suites, "--num-images", 2000, "--features", space]
        _do("analyze", output / "base.toml", *what, "-o", folder)
        analysis = json.loads((folder / "analysis.json").read_text())
        tests = analysis["distances"].pop("tests")
        distances[space] = {suite: tests[suite.removesuffix(":1")]["sets"] for suite in SUITES}
        floors[space] = {suite: tests[suite.removesuffix(":1")]["floor"] for suite in SUITES}
        analysis["student"]["file"] = "none/seed-0"  # no path of this machine
        analyses[space] = {key: value for key, value in analysis.items() if key != "environment"}
    top1 = evaluate(output, options.seeds)
    record = {
        "seeds": options.seeds,
        "epochs": EPOCHS,
        "draws": DRAWS,
        "config": to_toml(settings()),
        "cpu_seconds_of_this_call": round(time.process_time() - start),
        "relation": relate(distances, top1),
        "top1": top1,
        "distances": distances,
        "floors": floors,
        "analyses": analyses,
        "environment": environment(),
    }
    text = json.dumps(plain(rounded(record)), separators=(",", ":"), ensure_ascii=False)
    atomic_write_text(DOCS / "records" / "analyze.json", text + "\n")
    show(DOCS)
    return 0


def rounded(value: Any) -> Any:
    """Round all floats to six digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
