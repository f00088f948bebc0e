"""Read the files of one run: results.json, run.json, config.toml, metrics.jsonl.

Each may be missing or damaged. Nothing here raises for a file's content: unusable parts are left
out and become a line in `problems`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dad_fast.config.fields import read_toml
from dad_fast.evaluation.tables import METRICS, computed_on

# A folder with any of these files belongs to a run.
FILES = ("results.json", "run.json", "config.toml", "metrics.jsonl")


@dataclass
class Run:
    """One seed of a variant.

    record: its part of results.json; None before the run is finished
    settings: config.toml by full key ("data.batch_size")
    facts: run.json: environment, weights, kernels
    rows: metrics.jsonl
    """

    folder: Path
    record: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def processes(self) -> int:
        """Number of training processes, one GPU each."""
        found = self.facts.get("processes")
        return found if isinstance(found, int) and found > 0 else 1

    @property
    def shared_by(self) -> int:
        """Number of runs that learned from the same batches, this one included."""
        others = self.facts.get("shares_batches_with")
        return 1 + (len(others) if isinstance(others, list) else 0)

    @property
    def images_per_step(self) -> int | None:
        """Clean images per step, over all processes."""
        whole = self.settings.get("data.global_batch_size")
        if isinstance(whole, int) and whole > 0:
            return whole
        batch = self.settings.get("data.batch_size")
        accumulated = self.settings.get("engine.grad_accum_steps", 1)
        if isinstance(batch, int) and isinstance(accumulated, int):
            return batch * accumulated
        return None

    def kind(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == name]


def machine(facts: dict[str, Any]) -> str:
    """Describe the hardware of a run; "" if run.json does not record it."""
    gpus = facts.get("gpus")
    if not isinstance(gpus, list) or not {"cpu", "threads"} <= facts.keys():
        return ""
    if not all(isinstance(gpu, dict) and isinstance(gpu.get("name"), str) for gpu in gpus):
        return ""
    return computed_on(facts)


def number(row: dict[str, Any], path: str, factor: float = 1) -> float | None:
    """Return `factor` times the number at `path` ("gpu.power_w"); None unless it is finite."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    try:
        found = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None
    return factor * found if found is not None and math.isfinite(found) else None


def read_run(folder: Path, problems: list[str], record: Any = None) -> Run:
    """Read all files of `folder`. `record` is its results.json, if that has been read already."""
    where = folder / "results.json"
    record = read_json(where, problems) if record is None else record
    run = Run(folder, None if record is None else check_record(record, where, problems))
    facts = read_json(folder / "run.json", problems)
    run.facts = facts if isinstance(facts, dict) else {}
    try:
        run.config = (folder / "config.toml").read_text(encoding="utf-8")
        run.settings = _flat(read_toml(run.config))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"{short_name(folder)}/config.toml cannot be read ({_first(error)})")
    run.rows = _metrics(folder, problems)
    return run


def _metrics(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{short_name(folder)}/metrics.jsonl cannot be read ({_first(error)})")
        return []
    rows, bad = [], 0
    # A run in progress may be writing the text after the last line break.
    for line in lines[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("kind"), str):
            rows.append(row)
        else:
            bad += 1
    if bad or lines[-1].strip():
        torn = [f"{bad} of {len(lines) - 1} lines are damaged and left out"] if bad else []
        torn += ["the last line is torn and left out"] if lines[-1].strip() else []
        problems.append(f"{short_name(folder)}/metrics.jsonl: {', '.join(torn)}")
    return rows


def read_json(path: Path, problems: list[str]) -> Any:
    """Return the content of a JSON file; None if it is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{short_name(path.parent)}/{path.name} cannot be read ({_first(error)})")
        return None


def check_record(record: Any, path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Return `record` with every key that the tables need; None if it contains no result."""
    suites = record.get("suites") if isinstance(record, dict) else None
    if not isinstance(suites, dict):
        problems.append(f"{short_name(path.parent)}/results.json contains no results of a run")
        return None
    whole = {**record, "suites": _suites(suites, path, problems)}
    for key in ("variant", "method"):
        whole[key] = str(record.get(key) or record.get("method") or path.parent.name)
    for key in ("epochs", "seconds"):
        found = number(record, key)
        whole[key] = math.nan if found is None else found
    whole["seed"] = record["seed"] if isinstance(record.get("seed"), int) else 0
    whole["bn"] = record["bn"] if isinstance(record.get("bn"), str) else None
    for part in ("teacher", "discretizer"):
        used = record.get(part)
        if not isinstance(used, dict) or "name" not in used:
            whole[part] = None
            continue
        evaluated = used.get("suites")
        whole[part] = {
            **used,
            "name": str(used["name"]),
            "seen": str(used.get("seen") or ""),
            "suites": _suites(evaluated, path, problems) if isinstance(evaluated, dict) else {},
        }
    return whole


def _suites(suites: dict[str, Any], path: Path, problems: list[str]) -> dict[str, Any]:
    """Keep the results that have a top-1; a metric that is not a finite number becomes None."""
    kept = {}
    for name, result in suites.items():
        if not isinstance(result, dict) or number(result, "top1") is None:
            where = f"{short_name(path.parent)}/results.json"
            problems.append(f"{where}: suite {name} has no top-1 and is left out")
            continue
        metrics = {key: number(result, key) for key in METRICS}
        kept[name] = {**result, **metrics, "skipped": int(number(result, "skipped") or 0)}
    return kept


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def short_name(folder: Path) -> str:
    """Return the folder's name, for a seed's folder with that of its variant."""
    parts = folder.parts[-2:] if re.fullmatch(r"seed-\d+", folder.name) else folder.parts[-1:]
    return "/".join(parts)


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]
