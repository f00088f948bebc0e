"""Targets for one H200 next to the measured records of size paper: scripts/gpu_targets.py
FOLDER_OF_RECORDS

Ratios are to timm's plain distillation with the teacher online, in the same interleaved run, per
clean image unless said otherwise. Nothing has been measured on a GPU yet. Needs no packages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import Record, number, read_record

IMAGENET = 1_281_167  # images
# Stages of a step of DAD in the paper's order, and their number per step.
STAGES = {
    "teacher forward": 2,
    "teacher forward + input gradient": 1,
    "attack arithmetic": 1,
    "encode": 1,
    "lookup": 1,
    "decode": 1,
    "student forward + backward": 2,
    "optimizer, EMA": 1,
}
PAPER, AUTHORS = "dad, paper's order", "dad, authors' order"


class Records:
    """Rows of the newest records of size paper on a GPU. Raises KeyError for a missing row."""

    def __init__(self, folder: Path) -> None:
        self.comparisons: dict[tuple[str, str], Record] = {}
        for path in sorted(folder.glob("paper-*/*.json")):
            try:
                record = read_record(path)
            except ValueError:
                continue
            if record["machine"]["device"]["kind"] == "cuda":
                self.comparisons |= {
                    (record["group"], one["name"]): one for one in record["comparisons"]
                }

    def row(self, group: str, comparison: str, name: str) -> Record:
        rows = {row["name"]: row for row in self.comparisons[group, comparison]["rows"]}
        return rows[name]

    def ms(self, group: str, comparison: str, name: str) -> float:
        return self.row(group, comparison, name)["ms"]["median"]

    def ratio(self, group: str, comparison: str, name: str) -> float:
        return self.row(group, comparison, name)["ratio"]["median"]

    def stored(self) -> str:
        """Return the name of the only comparison of the group `stored`: the preset's batch size."""
        return next(name for group, name in self.comparisons if group == "stored")


class Target(NamedTuple):
    name: str
    limit: float
    unit: str
    at_least: bool
    measure: Callable[[Records], float]


def graphed(size: int, suffix: str) -> Callable[[Records], float]:
    return lambda found: found.ms("steps", f"batch {size}, graphs, {PAPER}", PAPER + suffix)


def over_stages(found: Records) -> float:
    parts = sum(times * found.ms("stages", "batch 256", stage) for stage, times in STAGES.items())
    return graphed(256, ", graphs")(found) / parts


def stage_rate(stage: str) -> Callable[[Records], float]:
    return lambda found: found.row("stages", "batch 256", stage)["per_second"]


def step_ratio(comparison: str, name: str) -> Callable[[Records], float]:
    return lambda found: found.ratio("steps", comparison, name)


def stored_ratio(name: str) -> Callable[[Records], float]:
    return lambda found: found.ratio("stored", found.stored(), name)


TARGETS = [
    Target("dad online, paper's order, ViT-B/16", 5.3, "x", False, step_ratio("batch 256", PAPER)),
    Target(
        "dad online, authors' order, ViT-B/16", 7.5, "x", False, step_ratio("batch 256", AUTHORS)
    ),
    Target(
        "dad online, paper's order, ResNet-50",
        6.5,
        "x",
        False,
        step_ratio("ResNet-50, batch 256", PAPER),
    ),
    Target(
        "dad online, authors' order, ResNet-50",
        9.0,
        "x",
        False,
        step_ratio("ResNet-50, batch 256", AUTHORS),
    ),
    Target("step in graphs / sum of its stages, batch 256", 1.02, "x", False, over_stages),
    Target(
        "graphs against none, batch 32",
        1.5,
        "x",
        True,
        lambda f: graphed(32, "")(f) / graphed(32, ", graphs")(f),
    ),
    Target(
        "stored images, teacher online, per image seen",
        1.03,
        "x",
        False,
        lambda f: stored_ratio("dad, stored images")(f) / 2,
    ),
    Target(
        "stored images and outputs",
        0.90,
        "x",
        False,
        stored_ratio("dad, stored images and outputs"),
    ),
    Target("stored codes decoded on the GPU", 3.5, "x", False, stored_ratio("dad, stored codes")),
    Target(
        "ImageNet-1k's adversarial images, paper's order",
        35,
        "min",
        False,
        lambda f: (
            IMAGENET / f.row("stored", f.stored(), "filling: adversarial images")["per_second"] / 60
        ),
    ),
    Target("teacher ViT-L/14, forward", 3280, "img/s", True, stage_rate("teacher forward")),
    Target(
        "teacher ViT-L/14, forward + input gradient",
        1485,
        "img/s",
        True,
        stage_rate("teacher forward + input gradient"),
    ),
    Target("VQGAN f8, encode", 2430, "img/s", True, stage_rate("encode")),
    Target("VQGAN f8, decode", 1400, "img/s", True, stage_rate("decode")),
    Target(
        "student ViT-B/16, forward + backward",
        4440,
        "img/s",
        True,
        stage_rate("student forward + backward"),
    ),
    Target(
        "codebook lookup, 256 images",
        0.25,
        "ms",
        False,
        lambda f: f.ms("stages", "batch 256", "lookup"),
    ),
    Target(
        "AdamW and EMA, ViT-B/16",
        0.85,
        "ms",
        False,
        lambda f: f.ms("stages", "batch 256", "optimizer, EMA"),
    ),
]


def targets(folder: Path) -> list[str]:
    """Return a line per target, or none without a record of size paper from a GPU."""
    found = Records(folder)
    if not found.comparisons:
        return []
    lines = [f"{'target':<50} {'wanted':>12}  measured"]
    for target in TARGETS:
        try:
            value = target.measure(found)
        except (KeyError, StopIteration):
            measured = "-"
        else:
            met = value >= target.limit if target.at_least else value <= target.limit
            measured = f"{number(value)} {target.unit}  {'met' if met else 'not met'}"
        wanted = f"{'>=' if target.at_least else '<='} {number(target.limit)} {target.unit}"
        lines.append(f"{target.name:<50} {wanted:>12}  {measured}")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(
        "\n".join(
            targets(Path(sys.argv[1])) or [f"no record of size paper from a GPU in {sys.argv[1]}"]
        )
    )
