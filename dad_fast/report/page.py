"""The report: one self-contained HTML page of one or more runs.

Sections: summary, training data and models, results, severities, classes, calibration, curves,
images, cost, environment.
`write_report` writes it at the end of every run; `dad-fast report` writes it for any run folders
next to each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dad_fast.errors import DataError
from dad_fast.evaluation.tables import notes as table_notes
from dad_fast.evaluation.tables import teachers
from dad_fast.files import atomic_write_text
from dad_fast.report.classes import classes_view
from dad_fast.report.cost import cost_table
from dad_fast.report.curves import COST_CURVES, CURVES, best_table, curves
from dad_fast.report.facts import differing, environment, trained
from dad_fast.report.looks import TEACHER, looks
from dad_fast.report.markup import details, document, legend, notes, preformatted, text
from dad_fast.report.results import (
    bar_notes,
    bars,
    reliability,
    reliability_notes,
    result_tables,
)
from dad_fast.report.runs import Group, Loaded, load
from dad_fast.report.severity import severity_view
from dad_fast.report.summary import headline
from dad_fast.report.tiles import PIECES, Tiles
from dad_fast.report.verdict import fairness

MAX_TITLE = 80  # characters; a longer list of names becomes their number


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from the files of a finished run or comparison; return its path.

    Raises DataError if `folder` has no valid results.json.
    """
    folder = Path(folder)
    loaded = load([folder])
    if not loaded.record["runs"]:
        problem = f"{folder}/results.json: not a results.json of a finished run"
        raise DataError("; ".join([problem, *loaded.problems]))
    path = folder / "report.html"
    atomic_write_text(path, page(loaded))
    return path


def page(loaded: Loaded) -> str:
    """Render the whole page. Unreadable picture sheets are added to `loaded.problems`."""
    groups, record = loaded.groups, loaded.record
    styles = looks(groups)
    students = [(name, *style) for name, style in styles.items()]
    key = legend(students) if len(groups) > 1 else ""
    key_with_teacher = legend([("teacher", *TEACHER), *students]) if teachers(record) else key

    # Reading the sheets may find problems, which the page lists.
    sheets = _sheets(groups, loaded.problems)

    results: list[str] = []
    per_shift: list[str] = []
    if record["runs"]:
        lines = [*table_notes(record, "top1"), *fairness(groups)]
        results = [result_tables(record), notes(lines)]
        per_shift = [bars(record, styles), notes(bar_notes(groups))]
    by_severity = severity_view(record, styles)
    calibration = reliability(record, styles)
    training = curves(groups, styles, CURVES)
    costs, cost_notes = cost_table(groups)
    cost_curves = curves(groups, styles, COST_CURVES)

    sections = {
        "Summary": headline(groups, record),
        "What was trained, and on what": [trained(groups)],
        "Result": results,
        "What differs": [differing(groups)] if len(groups) > 1 else [],
        "Accuracy per shift": per_shift,
        "Accuracy by severity": [key_with_teacher, by_severity] if by_severity else [],
        "Accuracy by class": [classes_view(record, styles)],
        "Calibration": [key_with_teacher, calibration, notes(reliability_notes())]
        if calibration
        else [],
        "Training": [key, training, best_table(groups)] if training else [],
        "Images: clean, discretized, attacked": [sheets],
        "Throughput, energy and overhead": [
            costs,
            notes(cost_notes),
            *([key, cost_curves] if cost_curves else []),
        ],
        "Environment": [environment(groups)],
        "Settings": [_settings(loaded)],
    }
    return document(title(groups), loaded.problems, sections)


def title(groups: Sequence[Group]) -> str:
    """Return the names of the runs, or their number if those are too long, and a common folder."""
    names = [group.label for group in groups]
    places = list(dict.fromkeys(group.origin.name for group in groups))
    listed = " · ".join(names)
    shown = listed if len(listed) <= MAX_TITLE or len(names) == 1 else f"{len(names)} runs"
    return f"{shown}: {places[0]}" if len(places) == 1 and places != names else shown


def _sheets(groups: Sequence[Group], problems: list[str]) -> str:
    """Return, for every group, the picture sheet of its first seed that has one."""
    folders = {}
    for group in groups:
        for run in group.runs:
            if (run.folder / PIECES).exists():
                folders[group.label] = run.folder
                break
    tiles = Tiles(len(folders))
    sheets = {name: tiles.sheet(folder, problems) for name, folder in folders.items()}
    return "".join(f"<h3>{text(name)}</h3>{sheet}" for name, sheet in sheets.items() if sheet)


def _settings(loaded: Loaded) -> str:
    """Return config.toml and run.json of every group's first seed, folded away."""
    files = {"config.toml of the comparison": loaded.config}
    for group in loaded.groups:
        run = group.runs[0]
        prefix = f"{group.label}: " if len(loaded.groups) > 1 else ""
        facts = json.dumps(run.facts, indent=2, ensure_ascii=False) if run.facts else ""
        files |= {f"{prefix}config.toml": run.config, f"{prefix}run.json": facts}
    return "".join(
        details(name, f"<pre>{preformatted(content)}</pre>")
        for name, content in files.items()
        if content
    )
