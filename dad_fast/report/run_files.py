"""Reads what one run has left in its folder: results.json, run.json, config.toml, metrics.jsonl; each may be missing or damaged.

Nothing here raises for a file's content: what cannot be used is left out and becomes a line in `problems`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dad_fast.config.fields import read_toml
from dad_fast.evaluate.tables import METRICS, computed_on

FILES = (
    "results.json",
    "run.json",
    "config.toml",
    "metrics.jsonl",
)  # any of them makes a folder a run's


@dataclass
class Run:
    """One seed. `record` is its part of results.json, None before the run is finished; `settings` is its config.toml by full key."""

    folder: Path
    record: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # run.json: environment, weights, kernels
    rows: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl

    @property
    def processes(self) -> int:
        """How many trained together, one GPU each."""
        found = self.facts.get("processes")
        return found if isinstance(found, int) and found > 0 else 1

    @property
    def images_per_step(self) -> int | None:
        """Clean images of a step, of all processes together."""
        whole, batch = (
            self.settings.get("data.global_batch_size"),
            self.settings.get("data.batch_size"),
        )
        if isinstance(whole, int) and whole > 0:
            return whole
        accumulated = self.settings.get("engine.grad_accum_steps", 1)
        return (
            batch * accumulated if isinstance(batch, int) and isinstance(accumulated, int) else None
        )

    def kind(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == name]


def machine(facts: dict[str, Any]) -> str:
    """What a run computed on, in words; "" where it is not recorded."""
    gpus = facts.get("gpus")
    if not isinstance(gpus, list) or not {"cpu", "threads"} <= facts.keys():
        return ""
    if not all(isinstance(gpu, dict) and isinstance(gpu.get("name"), str) for gpu in gpus):
        return ""
    return computed_on(facts)


def number(row: dict[str, Any], path: str, factor: float = 1) -> float | None:
    """`factor` times the finite number at `path` ("gpu.power_w") of a line of the log; None where there is none."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    try:
        found = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None
    return factor * found if found is not None and math.isfinite(found) else None


def read_run(folder: Path, problems: list[str], record: Any = None) -> Run:
    """What `folder` holds; `record` is its results.json where that has been read already."""
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
    for line in lines[:-1]:  # what follows the last line break is a line that is being written
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
    """None where there is no such file or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{short_name(path.parent)}/{path.name} cannot be read ({_first(error)})")
        return None


def check_record(record: Any, path: Path, problems: list[str]) -> dict[str, Any] | None:
    """`record` with what the tables need, None where there is no result in it. Older records lack some keys."""
    suites = record.get("suites") if isinstance(record, dict) else None
    if not isinstance(suites, dict):
        problems.append(f"{short_name(path.parent)}/results.json holds no results of a run")
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
        else:
            judged = (
                {"suites": _suites(used["suites"], path, problems)}
                if isinstance(used.get("suites"), dict)
                else {"suites": {}}
            )
            whole[part] = {
                **used,
                "name": str(used["name"]),
                "seen": str(used.get("seen") or ""),
                **judged,
            }
    return whole


def _suites(suites: dict[str, Any], path: Path, problems: list[str]) -> dict[str, Any]:
    """The results that have a top-1; a metric that is no finite number there is None."""
    kept = {}
    for name, result in suites.items():
        if not isinstance(result, dict) or number(result, "top1") is None:
            problems.append(
                f"{short_name(path.parent)}/results.json: suite {name} has no top-1 and is left out"
            )
            continue
        kept[name] = {
            **result,
            **{key: number(result, key) for key in METRICS},
            "skipped": int(number(result, "skipped") or 0),
        }
    return kept


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {prefix + key: value}
        )
    return flat


def short_name(folder: Path) -> str:
    parts = folder.parts[-2:] if re.fullmatch(r"seed-\d+", folder.name) else folder.parts[-1:]
    return "/".join(parts)


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]
