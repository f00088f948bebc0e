"""DAD's overhead over plain KD: compare with an earlier record, keep a history, and draw it over
commits.

    python -m benchmarks.overhead   # draws benchmarks/history.jsonl as benchmarks/overhead.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.record import Record
from dad_fast.files import atomic_write_text
from dad_fast.report.chart import ticks

HERE = Path(__file__).parent
HISTORY, CHART = HERE / "history.jsonl", HERE / "overhead.svg"
WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 900, 260, 50, 190, 30, 60
COLORS = ("#0b62a8", "#b65200", "#087a5a", "#a33a86", "#6b6300", "#1f86a8")


def parse_share(text: str) -> float:
    """Parse "5%" or "0.05" as 0.05. Raises ValueError for other texts."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise ValueError(f"--fail-over {text}: write a share such as 5% or 0.05")
    return value


def overheads(record: Record) -> dict[tuple[str, str], dict[str, float]]:
    """Return the ratios of DAD rows to plain KD (median, q1, q3), by (comparison, row)."""
    return {
        (f"{comparison['name']}, against {comparison['baseline']}", row["name"]): row["ratio"]
        for comparison in record["comparisons"]
        for row in comparison["rows"]
        if row["name"].startswith("dad")
    }


def grown(before: Record, now: Record | None, limit: float) -> list[str]:
    """Return a line for each overhead that grew by more than `limit`, or the reason why nothing can
    be compared.
    """
    if now is None:
        return ["--overhead-compare: no step benchmark ran, so nothing was compared"]
    old, new = overheads(before), overheads(now)
    then_where, now_where = _where(before), _where(now)
    if then_where != now_where:
        return [f"--overhead-compare: the record is of {then_where}, this run of {now_where}"]
    common = sorted(old.keys() & new.keys())
    if not common:
        return ["--overhead-compare: the record and this run have no DAD step in common"]
    found = []
    for key in common:
        change = new[key]["median"] / old[key]["median"] - 1
        if change > limit:
            current, then = (
                "{median:.2f} ({q1:.2f}–{q3:.2f})".format(**ratios[key]) for ratios in (new, old)
            )
            found.append(
                f"{key[0]}: {key[1]} costs {current} times plain KD, "
                f"{change:.1%} more than {then} in the record"
            )
    return found


def _where(record: Record) -> str:
    device = record["machine"]["device"]
    return f"size {record['size']} on {device.get('name', device['cpu'])}"


def append_history(record: Record, slug: str, path: Path = HISTORY) -> None:
    """Append a line per comparison with DAD rows to the history."""
    by_comparison: dict[str, dict[str, list[float]]] = {}
    for (comparison, row), ratio in overheads(record).items():
        by_comparison.setdefault(comparison, {})[row] = [
            round(ratio[key], 4) for key in ("q1", "median", "q3")
        ]
    machine = record["machine"]
    with path.open("a", encoding="utf-8") as file:
        for comparison, ratios in by_comparison.items():
            line = {
                "taken": record["taken"],
                "commit": machine["commit"],
                "dirty": machine["dirty"],
                "device": slug,
                "size": record["size"],
                "comparison": comparison,
                "ratios": ratios,
            }
            file.write(json.dumps(line) + "\n")


def read_history(path: Path) -> list[Record]:
    """Read the lines in order. Raises ValueError for a missing, empty or damaged file."""
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        raise ValueError(
            f"{path}: no history yet; run pytest benchmarks/test_steps.py --benchmark "
            "--append-history"
        )
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not JSON") from None
    return lines


def draw(lines: Sequence[Record]) -> str:
    """Draw a standalone SVG over commits: a panel per device, size and comparison, a line with
    quartiles per kind of step.
    """
    panels: dict[tuple[str, str, str], list[Record]] = {}
    for line in lines:
        panels.setdefault((line["device"], line["size"], line["comparison"]), []).append(line)
    parts = [
        _panel(i * PANEL, " · ".join(key), entries)
        for i, (key, entries) in enumerate(panels.items())
    ]
    size = f'viewBox="0 0 {WIDTH} {PANEL * len(panels)}" width="{WIDTH}" height="{PANEL * len(panels)}"'
    style = "<style>text { font: 12px system-ui, sans-serif; fill: #333 } .axis { stroke: #ddd }</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="#fff"/>{style}{"".join(parts)}</svg>\n'


def _panel(top: int, heading: str, entries: Sequence[Record]) -> str:
    values = [value for entry in entries for ratio in entry["ratios"].values() for value in ratio]
    scale = ticks(min(1.0, *values), max(values))

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(entries)

    def y(value: float) -> float:
        return (
            top
            + PANEL
            - BOTTOM
            - (PANEL - TOP - BOTTOM) * (value - scale[0]) / (scale[-1] - scale[0])
        )

    parts = [
        f'<text x="{LEFT}" y="{top + 18}">Cost of a DAD step over plain KD, with quartiles: {escape(heading)}</text>'
    ]
    for tick in scale:
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for i, entry in enumerate(entries):
        label = (entry["commit"] or "?")[:7] + ("+" if entry["dirty"] else "")
        title = f"<title>{escape(entry['taken'])}</title>"
        parts.append(
            f'<text transform="translate({x(i):.1f} {top + PANEL - BOTTOM + 12}) rotate(40)">{escape(label)}{title}</text>'
        )
    names = list(dict.fromkeys(name for entry in entries for name in entry["ratios"]))
    for number, name in enumerate(names):
        color = COLORS[number % len(COLORS)]
        points = [
            (x(i), entry["ratios"][name])
            for i, entry in enumerate(entries)
            if name in entry["ratios"]
        ]
        line = " ".join(f"{at:.1f},{y(ratio[1]):.1f}" for at, ratio in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for at, (low, middle, high) in points:
            ends = f'x1="{at:.1f}" x2="{at:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"'
            parts.append(f'<line {ends} stroke="{color}" stroke-width="6" opacity="0.4"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{y(middle):.1f}" r="3" fill="{color}"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT + 12}" y="{top + TOP + 18 * (number + 1)}" style="fill:{color}">{escape(name)}</text>'
        )
    return "".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--history", type=Path, default=HISTORY)
    parser.add_argument("--output", type=Path, default=CHART)
    given: Any = parser.parse_args(arguments)
    try:
        lines = read_history(given.history)
    except ValueError as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 1
    atomic_write_text(given.output, draw(lines))
    print(f"{given.output}: {len(lines)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
