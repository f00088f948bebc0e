"""DAD's overhead over plain KD: compared with an earlier record, kept in history.jsonl, and drawn over commits.

python -m benchmarks.overhead      draws benchmarks/history.jsonl as benchmarks/overhead.svg (make overhead)
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.record import Record

HERE = Path(__file__).parent
HISTORY = HERE / "history.jsonl"


def parse_share(text: str) -> float:
    """ "5%" or "0.05" -> 0.05; ValueError in one line."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise ValueError(f"--fail-over {text}: write a share such as 5% or 0.05")
    return value


def overheads(record: Record) -> dict[tuple[str, str], dict[str, float]]:
    """Ratios to plain KD (median, q1, q3) of the rows that are DAD, by (comparison, row)."""
    return {
        (comparison["name"], row["name"]): row["ratio"]
        for comparison in record["comparisons"]
        for row in comparison["rows"]
        if row["name"].startswith("dad")
    }


def grown(before: Record, now: Record | None, limit: float) -> list[str]:
    """What grew by more than `limit`, one line each; also what makes the comparison impossible."""
    if now is None:
        return ["--overhead-compare: no step benchmark ran, so nothing was compared"]
    old, new = overheads(before), overheads(now)
    devices = [record["machine"]["device"].get("name", record["machine"]["device"]["cpu"]) for record in (before, now)]
    if (before["size"], devices[0]) != (now["size"], devices[1]):
        return [f"--overhead-compare: the record is of size {before['size']} on {devices[0]}, this run of {now['size']} on {devices[1]}"]
    common = sorted(old.keys() & new.keys())
    if not common:
        return ["--overhead-compare: the record and this run have no DAD step in common"]
    found = []
    for key in common:
        change = new[key]["median"] / old[key]["median"] - 1
        if change > limit:
            current, then = ("{median:.2f} ({q1:.2f}–{q3:.2f})".format(**ratios[key]) for ratios in (new, old))
            found.append(f"{key[0]}: {key[1]} costs {current} times plain KD, {change:.1%} more than {then} in the record")
    return found


def append_history(record: Record, slug: str, path: Path = HISTORY) -> None:
    """One line per comparison with DAD in it."""
    by_comparison: dict[str, dict[str, list[float]]] = {}
    for (comparison, row), ratio in overheads(record).items():
        by_comparison.setdefault(comparison, {})[row] = [round(ratio[key], 4) for key in ("q1", "median", "q3")]
    machine = record["machine"]
    with path.open("a", encoding="utf-8") as file:
        for comparison, ratios in by_comparison.items():
            line = {"taken": record["taken"], "commit": machine["commit"], "dirty": machine["dirty"], "device": slug}
            file.write(json.dumps(line | {"size": record["size"], "comparison": comparison, "ratios": ratios}) + "\n")
