"""Total costs of stored DAD, from a record of the group `stored`: python -m benchmarks.stored_costs
RECORD.json

Per clean image and epoch, relative to plain distillation with the teacher online: the step, plus
the cost of filling the stores divided by the epochs of all runs. Calculated from measured steps,
for stores of adversarial images (one view) and of teacher outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.record import read_record

# (epochs of a run, stored views of the teacher's outputs)
PLANS = ((30, 30), (100, 100), (300, 30), (300, 10))
RUNS = (1, 3, 10)


def costs(ratio: dict[str, float], epochs: int, views: int, runs: int) -> dict[str, float]:
    """Return the cost per clean image and epoch by kind of training.

    `ratio`: steps and fillings to plain distillation.
    """
    total = epochs * runs
    adversarial = ratio["filling: adversarial images"] / total
    view = ratio["filling: outputs of a view"] * views / total
    stored = ratio["dad, stored images and outputs"] + adversarial + view
    return {
        "dad, stored images, teacher online": ratio["dad, stored images"] + adversarial,
        "dad, stored images and outputs": stored,
        "kd, stored outputs": ratio["kd, stored outputs"] + view,
    }


def table(ratio: dict[str, float]) -> str:
    marginal = {
        name: ratio[key]
        for name, key in (
            ("dad, stored images, teacher online", "dad, stored images"),
            ("dad, stored images and outputs", "dad, stored images and outputs"),
            ("kd, stored outputs", "kd, stored outputs"),
        )
    }
    lines = [
        "| epochs, stored views, runs | " + " | ".join(marginal) + " |",
        "| --- |" + " ---: |" * len(marginal),
    ]
    lines.append("| marginal | " + " | ".join(f"{value:.2f}" for value in marginal.values()) + " |")
    for epochs, views in PLANS:
        for runs in RUNS:
            found = costs(ratio, epochs, views, runs)
            cells = " | ".join(f"{value:.2f}" for value in found.values())
            lines.append(f"| {epochs}, {views}, {runs} | {cells} |")
    return "\n".join(lines)


def main(path: str) -> None:
    record = read_record(Path(path))
    for comparison in record["comparisons"]:
        print(table({row["name"]: row["ratio"]["median"] for row in comparison["rows"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
