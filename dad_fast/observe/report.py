"""One self-contained HTML page for a run or a comparison: result, bars per shift, curves, picture sheets, cost, settings."""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dad_fast.evaluate.table import METRICS, cell, notes, read_record, rows, suites, teachers, variants
from dad_fast.files import atomic_write_text
from dad_fast.observe.chart import Series, bar_chart, line_chart
from dad_fast.observe.runlog import read_metrics

SHEET = "sheet.png"
NUM_COLORS = 8
CURVES = (  # kind of row, its value, factor, heading
    ("val", "top1", 1, "Validation top-1 in %"),
    ("train", "loss", 1, "Training loss, each method's own"),
    ("train", "kept", 100, "Attacked images kept by the filter, in %"),
    ("train", "codes_changed", 100, "Codes changed by the attack, in %"),
)
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --soft: #5f6670; --line: #d4d8dd;
  --c0: #0b62a8; --c1: #b65200; --c2: #087a5a; --c3: #a33a86; --c4: #6b6300; --c5: #1f86a8; --c6: #7a4a2b; --c7: #5b5bd6; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --text: #e6e8ea; --soft: #a2a9b2; --line: #3a4047;
  --c0: #5cb0f2; --c1: #ff9d4d; --c2: #3fce9f; --c3: #ec8ccf; --c4: #d6c94a; --c5: #6fd2ee; --c6: #d09a75; --c7: #a5a5ff; } }
@media print { :root { --back: #fff; --text: #000; } section, figure { break-inside: avoid; } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 1040px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td.best { font-weight: 700; }
ul { color: var(--soft); font-size: 0.9rem; padding-left: 1.2rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 0.9rem; }
svg { width: 100%; max-width: 560px; height: auto; display: block; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; } .axis { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.2rem; font-size: 0.9rem; margin: 0.5rem 0; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin-right: 0.4em; }
img { max-width: 100%; height: auto; } pre { overflow-x: auto; font-size: 0.8rem; } summary { cursor: pointer; }
"""
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from what a finished run, or a comparison of runs, left in `folder`; returns its path.

    Raises DataError where there is no results.json.
    """
    folder = Path(folder)
    path = folder / "report.html"
    atomic_write_text(path, page(folder, read_record(folder / "results.json")))
    return path


def page(folder: Path, record: dict[str, Any]) -> str:
    """The whole page. The runs of a comparison lie in `folder`/VARIANT/seed-S, a single run is `folder` itself."""
    grouped = variants(record)
    colors = {name: f"var(--c{i % NUM_COLORS})" for i, name in enumerate(grouped)}
    logs = {name: [read_metrics(run_folder(folder, run)) for run in runs] for name, runs in grouped.items()}
    title = f"{' · '.join(grouped)}: {folder.resolve().name}"
    legend = "".join(f'<span><i style="background:{colors[name]}"></i>{escape(name)}</span>' for name in grouped)
    parts = [
        f"<h1>{escape(title)}</h1>",
        _section("Result", _result_table(record), _list(notes(record, "top1"))),
        _section("Accuracy per shift", f'<div class="legend">{legend}</div>', _bars(record, colors)),
        _section("Training", f'<div class="legend">{legend}</div>', _curves(logs, colors)),
        _section("Original, Q(original), Q(attacked), and the change between the last two", _sheets(folder, grouped)),
        _section("Cost", _cost_table(grouped, logs)),
        _section("Settings and machine", _settings(folder, record)),
    ]
    return HEAD.format(title=escape(title), style=STYLE) + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"


def run_folder(folder: Path, run: dict[str, Any]) -> Path:
    nested = folder / run["variant"] / f"seed-{run['seed']}"
    return nested if nested.is_dir() else folder


def _section(heading: str, *content: str) -> str:
    """Nothing where the last part of the content is empty."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(content) + "\n</section>" if content[-1] else ""


def _list(lines: Sequence[str]) -> str:
    """Notes; what stands in backticks, as in markdown, becomes code."""
    items = (re.sub("`(.*?)`", r"<code>\1</code>", escape(line)) for line in lines)
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _heading(text: str) -> str:
    """A column's heading, which may break after an underscore only."""
    return escape(text).replace(" ", "&nbsp;").replace("_", "_<wbr>")


def _table(header: Sequence[str], body: Sequence[Sequence[str]], best: set[tuple[int, int]] = frozenset()) -> str:  # type: ignore[assignment]
    lines = ["".join(f"<th>{_heading(text)}</th>" for text in header)]
    for i, row in enumerate(body):
        lines.append("".join(f"<td{' class=best' if (i, j) in best else ''}>{escape(text)}</td>" for j, text in enumerate(row)))
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _result_table(record: dict[str, Any]) -> str:
    return "".join(f"<p>{escape(METRICS[metric])}</p>{_table(*rows(record, metric))}" for metric in ("top1", "ece"))


def _bars(record: dict[str, Any], colors: dict[str, str]) -> str:
    figures, taught_by = [], teachers(record)
    for suite in suites(record):
        bars = [("teacher" if len(taught_by) == 1 else t["name"], cell([t], suite, "top1"), "var(--soft)") for t in taught_by]
        bars += [(name, cell(runs, suite, "top1"), colors[name]) for name, runs in variants(record).items()]
        figures.append(bar_chart(f"{suite}, top-1 in %", [(label, *found, color) for label, found, color in bars if found]))
    return _grid(figures)


def _curves(logs: dict[str, list[list[dict[str, Any]]]], colors: dict[str, str]) -> str:
    """One line per seed."""
    figures = []
    for kind, value, factor, heading in CURVES:
        series = []
        for name, seeds in logs.items():
            for seed in seeds:
                points = [(float(row["epoch"]), factor * float(row[value])) for row in seed if row["kind"] == kind and value in row]
                series.append(Series(name, colors[name], [point for point in points if math.isfinite(point[1])]))
        if any(line.points for line in series):
            figures.append(line_chart(heading, "epoch", series))
    return _grid(figures)


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _sheets(folder: Path, grouped: dict[str, list[dict[str, Any]]]) -> str:
    """The first seed's sheet of every variant that has one."""
    figures = []
    for name, runs in grouped.items():
        path = run_folder(folder, runs[0]) / SHEET
        if path.exists():
            image = (
                f'<img alt="picture sheet of {escape(name)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
            )
            figures.append(f"<figure><figcaption>{escape(name)}</figcaption>{image}</figure>")
    return "".join(figures)


def _cost_table(grouped: dict[str, list[dict[str, Any]]], logs: dict[str, list[list[dict[str, Any]]]]) -> str:
    header = ["", "steps", "train s", "img/s", "data wait", "GPU memory", "bad images"]
    body = []
    for name, runs in grouped.items():
        logged = [row for seed in logs[name] for row in seed if row["kind"] == "train"]
        body.append(
            [
                name,
                _mean(runs, "steps", "{:.0f}"),
                _mean(runs, "seconds", "{:.0f}"),
                _mean(logged, "img_per_s", "{:,.0f}"),
                _mean(logged, "data_wait", "{:.0%}"),
                _mean(logged, "gpu_memory", "{:.1f} GiB"),
                _mean(runs, "bad_images", "{:g}"),
            ]
        )
    note = "Means over seeds and log steps. img/s counts clean images; data wait is the share of the time spent waiting for them."
    return _table(header, body) + _list([note])


def _mean(found: Sequence[dict[str, Any]], name: str, form: str) -> str:
    values = [float(row[name]) for row in found if name in row]
    return form.format(statistics.fmean(values)) if values else "–"


def _settings(folder: Path, record: dict[str, Any]) -> str:
    """The configuration and the machine: in a comparison's record, beside a single run in config.toml and run.json."""
    texts = {name: (folder / name).read_text() for name in ("config.toml", "run.json") if (folder / name).exists()}
    if "config" in record:
        texts["config.toml"] = record["config"]
    if "environment" in record:
        texts["run.json"] = json.dumps(record["environment"], indent=2, ensure_ascii=False)
    return "".join(f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in texts.items())
