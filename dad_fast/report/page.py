"""One self-contained HTML page for runs: what was trained on what, results, calibration, curves, images, cost, environment.

`write_report` makes it at the end of every run and `dad-fast report` from any run folders, side by side. It needs neither the
network nor scripts, and no template engine: the page is sections of text, tables and drawings, each made by one function.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dad_fast.errors import DataError
from dad_fast.evaluate.tables import notes as table_notes
from dad_fast.evaluate.tables import teachers
from dad_fast.files import atomic_write_text
from dad_fast.report.chart import Series, line_chart
from dad_fast.report.cost import cost_table
from dad_fast.report.facts import differing, environment, trained
from dad_fast.report.markup import (
    contents,
    details,
    document,
    grid,
    legend,
    look,
    notes,
    preformatted,
    section,
    text,
)
from dad_fast.report.results import (
    TEACHER,
    bar_notes,
    bars,
    fairness,
    reliability,
    reliability_notes,
    result_tables,
)
from dad_fast.report.run_files import number
from dad_fast.report.runs import Group, Loaded, load
from dad_fast.report.tiles import PIECES, SHEET, Tiles

CURVES = (  # kind of row, its value, factor, heading, unit
    ("val", "top1", 1, "Validation top-1", "%"),
    ("train", "loss", 1, "Training loss", "nats, each method's own sum"),
    ("train", "kept", 100, "Attacked images kept by the filter", "%"),
    ("train", "codes_changed", 100, "Codes changed by the attack", "%"),
    ("val", "ece", 1, "Validation calibration error", "%"),
)
COST_CURVES = (
    ("train", "img_per_s", 1, "Throughput", "clean images a second"),
    ("train", "data_wait", 100, "Waiting for data", "% of the time"),
    ("train", "gpu.power_w", 1, "Power of the GPU", "W"),
    ("train", "gpu_memory", 1, "GPU memory, highest so far", "GiB"),
)


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from what a finished run, or a comparison of runs, left in `folder`; returns its path.

    Raises DataError where there is no sound results.json.
    """
    folder = Path(folder)
    loaded = load([folder])
    if not loaded.record["runs"]:
        raise DataError(
            "; ".join(
                [f"{folder}/results.json: not a results.json of a finished run", *loaded.problems]
            )
        )
    path = folder / "report.html"
    atomic_write_text(path, page(loaded))
    return path


def page(loaded: Loaded) -> str:
    """The whole page; picture sheets that cannot be read are added to `loaded.problems`."""
    groups, record = loaded.groups, loaded.record
    looks = {group.label: look(i) for i, group in enumerate(groups)}
    named = [(name, *found) for name, found in looks.items()]
    key = legend(named) if len(groups) > 1 else ""
    teacher_results = legend([("teacher", *TEACHER), *named]) if teachers(record) else key
    sheets = _sheets(groups, loaded.problems)  # before the problems are shown
    costs, cost_notes = cost_table(groups)
    done = bool(record["runs"])
    sections = {
        "What was trained, and on what": [trained(groups)],
        "Result": [result_tables(record), notes([*table_notes(record, "top1"), *fairness(groups)])]
        if done
        else [],
        "What differs": [differing(groups)] if len(groups) > 1 else [],
        "Accuracy per shift": [bars(record, looks), notes(bar_notes(groups))] if done else [],
        "Calibration": _with_key(
            teacher_results, reliability(record, looks), notes(reliability_notes())
        ),
        "Training": _with_key(key, _curves(groups, looks, CURVES)),
        "Images: clean, discretized, attacked": [sheets],
        "Throughput, energy and overhead": [
            costs,
            notes(cost_notes),
            *_with_key(key, _curves(groups, looks, COST_CURVES)),
        ],
        "Environment": [environment(groups)],
        "Settings": [_settings(loaded)],
    }
    filled = {heading: content for heading, content in sections.items() if any(content)}
    top = [
        f"<h1>{text(title(groups))}</h1>",
        contents(list(filled)),
        notes(loaded.problems, "problems"),
    ]
    return document(
        title(groups), [*top, *(section(heading, *content) for heading, content in filled.items())]
    )


def title(groups: Sequence[Group]) -> str:
    """The names of the runs where that is short enough, their number otherwise; and the folder that they have in common."""
    names = [group.label for group in groups]
    places = list(dict.fromkeys(group.origin.name for group in groups))
    listed = " · ".join(names)
    shown = listed if len(listed) <= 80 or len(names) == 1 else f"{len(names)} runs"
    return f"{shown}: {places[0]}" if len(places) == 1 and places != names else shown


def _with_key(key: str, figures: str, *more: str) -> list[str]:
    return [key, figures, *more] if figures else []


def _curves(
    groups: Sequence[Group],
    looks: dict[str, tuple[str, str]],
    curves: Sequence[tuple[str, str, float, str, str]],
) -> str:
    """One line per seed."""
    figures = []
    for kind, value, factor, heading, unit in curves:
        series = []
        for group in groups:
            for run in group.runs:
                found = [(number(row, "epoch"), number(row, value)) for row in run.kind(kind)]
                points = [(x, factor * y) for x, y in found if x is not None and y is not None]
                color, dashes = looks[group.label]
                series.append(Series(group.label, color, points, dashes))
        if any(line.points for line in series):
            figures.append(line_chart(heading, unit, "epoch", series))
    return grid(figures)


def _sheets(groups: Sequence[Group], problems: list[str]) -> str:
    """The sheet of every group's first seed that has one."""
    having = {}
    for group in groups:
        folder = next(
            (
                run.folder
                for run in group.runs
                if (run.folder / PIECES).exists() or (run.folder / SHEET).exists()
            ),
            None,
        )
        if folder:
            having[group.label] = folder
    tiles = Tiles(len(having))
    made = {name: tiles.sheet(folder, problems) for name, folder in having.items()}
    return "".join(f"<h3>{text(name)}</h3>{content}" for name, content in made.items() if content)


def _settings(loaded: Loaded) -> str:
    """Configuration and run.json as they lie on disk, folded away; of the first seed of every group."""

    def name(group: Group, file: str) -> str:
        return f"{group.label}: {file}" if len(loaded.groups) > 1 else file

    parts = (
        [details("config.toml of the comparison", f"<pre>{preformatted(loaded.config)}</pre>")]
        if loaded.config
        else []
    )
    for group in loaded.groups:
        run = group.runs[0]
        if run.config:
            parts.append(
                details(name(group, "config.toml"), f"<pre>{preformatted(run.config)}</pre>")
            )
        if run.facts:
            shown = json.dumps(run.facts, indent=2, ensure_ascii=False)
            parts.append(details(name(group, "run.json"), f"<pre>{preformatted(shown)}</pre>"))
    return "".join(parts)
