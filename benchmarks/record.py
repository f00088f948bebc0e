"""Benchmark records: making, reading, writing, and tables. benchmarks/README.md describes the
schema.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dad_fast.files import atomic_write_json

SCHEMA = 1
SIZES = ("tiny", "base", "paper")
Record = dict[str, Any]


def make_record(
    group: str, size: str, comparisons: Sequence[Record], machine: Record, seconds: float
) -> Record:
    """Make a record; `machine` comes from `Machine.describe` at the end of the session."""
    taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "schema": SCHEMA,
        "group": group,
        "size": size,
        "taken": taken,
        "seconds": round(seconds, 1),
        "machine": machine,
        "comparisons": list(comparisons),
    }


def record_path(folder: str | Path, record: Record, slug: str) -> Path:
    """Return FOLDER/SIZE-DEVICE/GROUP.json: one current record per device, size and group; git
    keeps older ones.
    """
    return Path(folder) / f"{record['size']}-{slug}" / f"{record['group']}.json"


def write_record(path: Path, record: Record) -> None:
    atomic_write_json(path, record)


def read_record(path: str | Path) -> Record:
    """Read a record. Raises ValueError for a file that is not a record of this schema."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON") from None
    if (
        not isinstance(record, dict)
        or record.get("schema") != SCHEMA
        or not isinstance(record.get("comparisons"), list)
    ):
        raise ValueError(
            f"{path}: not a benchmark record of schema {SCHEMA}; see benchmarks/README.md"
        )
    return record


COLUMNS = (
    "",
    "ms",
    "quartiles",
    "/s",
    "ratio",
    "quartiles",
    "predicted",
    "TFLOP/s",
    "peak MiB",
    "J",
    "n",
)


def table(comparison: Record) -> list[list[str]]:
    """Return rows of text under COLUMNS; a column without values is empty in every row."""
    unit = comparison["unit"]
    rows = []
    for row in comparison["rows"]:
        ms, ratio = row["ms"], row["ratio"]
        is_baseline = row["name"] == comparison["baseline"]
        rows.append(
            [
                row["name"],
                number(ms["median"]),
                f"{number(ms['q1'])}–{number(ms['q3'])}",
                f"{number(row['per_second'])} {unit}",
                f"{ratio['median']:.2f}",
                "" if is_baseline else f"{ratio['q1']:.2f}–{ratio['q3']:.2f}",
                f"{row['predicted']:.2f}" if "predicted" in row else "",
                number(row["tflops"]) if "tflops" in row else "",
                f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
                number(row["joules"]) if "joules" in row else "",
                str(ms["n"]),
            ]
        )
    return rows


def shown_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    return [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]


def as_text(comparison: Record) -> str:
    """Format a comparison as aligned text for the terminal."""
    rows = table(comparison)
    keep = shown_columns(rows)
    lines = [[COLUMNS[i] for i in keep], *([row[i] for i in keep] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keep))]
    text = [f"{comparison['name']}   (ratio to {comparison['baseline']!r})"]
    for line in lines:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  " + "  ".join(cells).rstrip())
    return "\n".join([*text, *(f"  {line}" for line in remarks(comparison))])


def remarks(comparison: Record) -> list[str]:
    """Return lines for below the table: functions that were left out, memory of the process."""
    lines = [f"{name}: left out ({why})" for name, why in comparison.get("left_out", {}).items()]
    if "memory" in comparison:
        memory = comparison["memory"]
        lines.append(
            f"peak of the process: {number(memory['allocated_gib'])} GiB allocated, "
            f"{number(memory['reserved_gib'])} GiB reserved"
        )
    return lines


def number(value: float) -> str:
    """Format three significant digits, without an exponent from 0.001 on."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.1e}"
