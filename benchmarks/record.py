"""Records of benchmarks: what they hold, where they lie, and how they read as a table. The schema is described in benchmarks/README.md."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dad_fast.observe.device import Gpu
from dad_fast.observe.files import atomic_write_json
from dad_fast.observe.runlog import environment

SCHEMA = 1
Record = dict[str, Any]


class Machine:
    """The machine of a session, as its records describe it: facts once, and what it did between start and end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = Gpu.open(device.index or 0) if device.type == "cuda" else None
        self.facts = environment()
        self.start = self._state()
        self._busy_start = _cpu_seconds()

    @property
    def slug(self) -> str:
        """A folder's name for this device, such as nvidia-h200 or cpu-amd-epyc."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"cpu {self.facts['cpu']}"
        name = re.sub(r"\(R\)|\(TM\)|@.*| CPU| Processor", "", name)
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def describe(self) -> Record:
        """The `machine` of a record."""
        facts = self.facts
        commit = facts["git"] or ""
        device: Record = {"kind": self.device.type, "cpu": facts["cpu"], "cpus": facts["cpus"], "threads": torch.get_num_threads()}
        if self.device.type == "cuda":
            device |= facts["gpus"][self.device.index or 0] | (self.gpu.facts() if self.gpu else {})
        return {
            "device": device,
            "start": self.start,
            "end": self._state(),
            "cpu_share_of_others": self._others(),
            "python": facts["python"],
            "packages": facts["packages"],
            "cuda": facts["cuda"],
            "cudnn": facts["cudnn"],
            "commit": commit.rstrip("+") or None,
            "dirty": commit.endswith("+"),
        }

    def _state(self) -> Record:
        load = {"load": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}
        return load | (self.gpu.sample() if self.gpu else {})

    def _others(self) -> float | None:
        """Share of all cores' time that other processes took while this session ran; None where the kernel does not say."""
        start, end = self._busy_start, _cpu_seconds()
        if start is None or end is None or end[0] <= start[0]:
            return None
        return round(max(0.0, (end[1] - start[1]) / (end[0] - start[0])), 3)


def _cpu_seconds() -> tuple[float, float] | None:
    """(time of all cores, busy time of processes other than this one and its children), in seconds."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    per_second = os.sysconf("SC_CLK_TCK")
    busy = (sum(ticks) - ticks[3] - ticks[4]) / per_second  # all but idle and waiting for disks
    return sum(ticks) / per_second, busy - sum(os.times()[:4])


def make_record(group: str, size: str, comparisons: Sequence[Record], machine: Machine, seconds: float) -> Record:
    taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "schema": SCHEMA,
        "group": group,
        "size": size,
        "taken": taken,
        "seconds": round(seconds, 1),
        "machine": machine.describe(),
        "comparisons": list(comparisons),
    }


def record_path(folder: str | Path, record: Record, slug: str) -> Path:
    """FOLDER/SIZE-DEVICE/GROUP.json: one current record per device, size and group; older ones are in git's history."""
    return Path(folder) / f"{record['size']}-{slug}" / f"{record['group']}.json"


def write_record(path: Path, record: Record) -> None:
    atomic_write_json(path, record)


def read_record(path: str | Path) -> Record:
    """ValueError, in one line, for a file that is no record of this schema."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or not isinstance(record.get("comparisons"), list):
        raise ValueError(f"{path}: not a benchmark record of schema {SCHEMA}; see benchmarks/README.md")
    return record


COLUMNS = ("", "ms", "quartiles", "/s", "ratio", "quartiles", "predicted", "peak MiB", "J", "n")


def table(comparison: Record) -> list[list[str]]:
    """Rows of text under COLUMNS; columns that nothing fills are empty in every row."""
    unit = comparison["unit"]
    rows = []
    for row in comparison["rows"]:
        ms, ratio = row["ms"], row["ratio"]
        is_baseline = row["name"] == comparison["baseline"]
        rows.append([
            row["name"],
            number(ms["median"]),
            f"{number(ms['q1'])}–{number(ms['q3'])}",
            f"{number(row['per_second'])} {unit}",
            f"{ratio['median']:.2f}",
            "" if is_baseline else f"{ratio['q1']:.2f}–{ratio['q3']:.2f}",
            f"{row['predicted']:.2f}" if "predicted" in row else "",
            f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
            number(row["joules"]) if "joules" in row else "",
            str(ms["n"]),
        ])  # fmt: skip
    return rows


def shown_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    return [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]


def as_text(comparison: Record) -> str:
    """A comparison as aligned text, for the terminal."""
    rows = table(comparison)
    keep = shown_columns(rows)
    lines = [[COLUMNS[i] for i in keep], *([row[i] for i in keep] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keep))]
    text = [f"{comparison['name']}   (ratio to {comparison['baseline']!r})"]
    for line in lines:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        text.append("  " + "  ".join(cells).rstrip())
    return "\n".join(text)


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.1e}"
