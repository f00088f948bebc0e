"""Table of a comparison: variants by suites, mean ± standard deviation over student seeds.

A record, OUT/results.json, holds every seed, from which the table is made:

    {"config": TOML text, "environment": {...}, "runs": [run, ...]}
    run = {"variant", "method", "seed", "epochs", "seconds", "suites": {name: Result as a dict},
           "teacher": {"name", "seen", "suites"} or None, "discretizer": {"name", "seen"} or None,
           "bn": mode or None, ...}

`python -m dad_fast.evaluation.tables OUT/results.json [METRIC]` prints it as markdown, for top1 or
another of METRICS.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dad_fast.errors import DataError, UsageError, program
from dad_fast.methods.registry import METHODS


class Metric(NamedTuple):
    """A metric's description, digits after the point, and sign: 1 where higher is better."""

    words: str
    digits: int = 1
    sign: int = -1


METRICS = {
    "top1": Metric("Top-1 accuracy in %", sign=1),
    "balanced_accuracy": Metric("Balanced accuracy (mean over classes) in %", sign=1),
    "top5": Metric("Top-5 accuracy in %", sign=1),
    "mce": Metric("Mean corruption error, relative to AlexNet, in %"),
    "ece": Metric("Expected calibration error in %"),
    "ece_adaptive": Metric("Adaptive expected calibration error in %"),
    "nll": Metric("Negative log-likelihood in nats", digits=2),
    "brier": Metric("Brier score, 0 to 2", digits=3),
    "agreement": Metric("Agreement with the teacher in %", sign=1),
}

# Header, rows of text, and (row, column) of the cells in bold.
Grid = tuple[list[str], list[list[str]], set[tuple[int, int]]]


def read_record(path: str | Path) -> dict[str, Any]:
    """Read results.json of a comparison or of a single run. Raises DataError for other files."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a results.json ({error})") from None
    if isinstance(record, dict) and "suites" in record:
        record = {"runs": [record]}
    runs = record.get("runs") if isinstance(record, dict) else None
    if not isinstance(runs, list) or not runs or not all(map(_is_run, runs)):
        raise DataError(
            f"{path}: contains no runs; name the results.json of a finished run or comparison"
        )
    return record


def _is_run(run: Any) -> bool:
    if not isinstance(run, dict) or not isinstance(run.get("variant"), str):
        return False
    results = run.get("suites")
    return isinstance(results, dict) and all(isinstance(one, dict) for one in results.values())


def suites(record: dict[str, Any]) -> list[str]:
    """Return every suite of the record, in the order of evaluation."""
    return list(dict.fromkeys(name for run in record["runs"] for name in run["suites"]))


def variants(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the runs by variant, one run per seed, in order."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        grouped.setdefault(run["variant"], []).append(run)
    return grouped


def teachers(record: dict[str, Any], part: str = "teacher") -> list[dict[str, Any]]:
    """Return the teachers (or another frozen `part`) of the runs, each once."""
    return list({run[part]["name"]: run[part] for run in record["runs"] if run.get(part)}.values())


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which is None for a single value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    # `statistics.stdev` raises for values that are not finite.
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1))


def cell(
    runs: Sequence[dict[str, Any]], suite: str, metric: str
) -> tuple[float, float | None] | None:
    """Return `spread` of a metric over runs; None where a run lacks the suite or the metric."""
    found = [value_of(run, suite, metric) for run in runs]
    values = [value for value in found if value is not None]
    return spread(values) if len(values) == len(runs) else None


def value_of(run: dict[str, Any], suite: str, metric: str) -> float | None:
    """Return a metric of a run on a suite, or None."""
    value = run["suites"].get(suite, {}).get(metric)
    return None if value is None else float(value)


def rows(record: dict[str, Any], metric: str) -> Grid:
    """Return header, rows of text (teachers first) and the best cells, to show in bold.

    Cells that are not clearly worse than the best are in bold too. Clearly worse is by more than one
    standard deviation, the larger of the two. With one seed there is none, and no cell is bold.
    """
    names, by_variant = suites(record), variants(record)
    _, digits, sign = METRICS[metric]
    stores = ["stores s"] if any(run.get("store_seconds") for run in record["runs"]) else []
    best = ["best"] if any(run.get("best_epoch") for run in record["runs"]) else []
    header = ["", "seeds", "epochs", *best, "train s", *stores, *names]
    first_suite = len(header) - len(names)
    table = []
    for teacher in teachers(record):
        results = [_text(cell([teacher], name, metric), digits) for name in names]
        table.append([f"teacher {teacher['name']}", *[""] * (first_suite - 1), *results])
    first = len(table)
    cells = [[cell(runs, name, metric) for name in names] for runs in by_variant.values()]
    for (variant, runs), row in zip(by_variant.items(), cells, strict=True):
        epochs = statistics.fmean(float(run["epochs"]) for run in runs)
        seconds = spread([float(run["seconds"]) for run in runs])
        made = max(float(run.get("store_seconds") or 0) for run in runs)
        filled = [f"{made:.0f}" if made else "" for _ in stores]
        validated = statistics.fmean(float(run.get("best_epoch") or 0) for run in runs)
        shown = [f"{round(validated, 2):g}" if validated else "" for _ in best]
        results = [_text(found, digits) for found in row]
        counts = [variant, str(len(runs)), f"{round(epochs, 2):g}", *shown]
        table.append([*counts, _text(seconds, 0), *filled, *results])
    bold = set()
    for column in range(len(names)):
        scored: list[tuple[int, float, float | None]] = []
        for i, cells_of_variant in enumerate(cells):
            found = cells_of_variant[column]
            if found and math.isfinite(found[0]):
                scored.append((i, *found))
        if len(scored) < 2 or any(sd is None for _, _, sd in scored):
            continue
        _, top, top_sd = max(scored, key=lambda item: sign * item[1])
        bold |= {
            (first + i, first_suite + column)
            for i, mean, sd in scored
            if abs(top - mean) <= max(top_sd or 0.0, sd or 0.0)
        }
    return header, table, bold


def _attacks(method: str) -> bool:
    """Return whether the method attacks images; True for an unknown method."""
    spec = METHODS.find(method)
    return spec is None or spec.attacks


def _text(found: tuple[float, float | None] | None, digits: int) -> str:
    if found is None:
        return "–"
    mean, sd = found
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def notes(record: dict[str, Any], metric: str) -> list[str]:
    """Return the notes below the table."""
    from dad_fast.evaluation.corruptions.common import CORRUPTIONS, REMARKS

    counts = sorted({len(runs) for runs in variants(record).values()})
    seeds = " or ".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")
    lower = " (lower is better)" if METRICS[metric].sign < 0 else ""
    lines = [f"{METRICS[metric].words}{lower}; {seeds} of the student."]
    if counts == [1]:
        lines[0] += " One seed shows no spread: small differences mean nothing."
    else:
        lines[0] += (
            " Mean ± standard deviation over student seeds only: the teacher, the discretizer and"
            " the split are the same."
            " Bold: the best student, and those within one standard deviation of it."
        )
    names = suites(record)
    corrupted = [name for name in names if name.partition(":")[0] in CORRUPTIONS]
    if corrupted:
        base = next((name for name in names if name not in corrupted), "the validation split")
        lines.append(
            f"Corruptions are applied to `{base}`; "
            "a name without a number covers all its severities."
        )
        lines += [
            f"{name}: {remark}."
            for name, remark in REMARKS.items()
            if any(one.partition(":")[0] == name for one in corrupted)
        ]
    for part in ("teacher", "discretizer"):
        for used in teachers(record, part):
            seen = (used["seen"] or "not recorded in the weights").rstrip(".")
            lines.append(f"{part.capitalize()} {used['name']}, trained on: {seen}.")
    modes = sorted(
        {run["bn"] for run in record["runs"] if run.get("bn") and _attacks(run["method"])}
    )
    if modes:
        lines.append(
            f"Batch norm of the students over clean and attacked images: {', '.join(modes)}."
        )
    results = {
        name: [run["suites"][name] for run in record["runs"] if name in run["suites"]]
        for name in names
    }
    for name in names:
        skipped = max(int(result.get("skipped", 0)) for result in results[name])
        if skipped:
            lines.append(f"{name}: {skipped} unreadable images are left out.")
        non_finite = max(int(result.get("non_finite") or 0) for result in results[name])
        if non_finite:
            lines.append(
                f"{name}: up to {non_finite} images of a run have non-finite logits: they count as "
                "wrong, and are left out of ECE, NLL and Brier score."
            )
    for name in names:
        protocol = results[name][-1].get("protocol", "")
        # With a note: masked outputs or missing images.
        if "; " in protocol:
            lines.append(f"{name}: {protocol}.")
    facts = record.get("environment")
    if facts:
        lines.append(f"Train s: seconds of training without evaluation, on {computed_on(facts)}.")
    shared = max(int(run.get("shared_by") or 1) for run in record["runs"])
    if shared > 1:
        lines.append(
            f"Up to {shared} runs learned from the same batches; each counts an equal part of the "
            "seconds."
        )
    if any(run.get("best_epoch") for run in record["runs"]):
        lines.append("Best: epochs trained at the best validation, the mean over seeds.")
    if any(run.get("store_seconds") for run in record["runs"]):
        lines.append(
            "Stores s: seconds to fill the stores of a run, "
            "once for all runs and seeds that share them."
        )
    return lines


def markdown(record: dict[str, Any], metric: str = "top1") -> str:
    """Format the table and its notes as GitHub markdown."""
    return "\n".join(
        [*grid_markdown(rows(record, metric)), "", *(f"- {note}" for note in notes(record, metric))]
    )


def grid_markdown(grid: Grid) -> list[str]:
    """Format a grid as the lines of a GitHub markdown table."""
    header, table, best = grid
    lines = [
        "| " + " | ".join(map(_escape, header)) + " |",
        "|" + "---|" + "---:|" * (len(header) - 1),
    ]
    for i, row in enumerate(table):
        shown = [
            f"**{text}**" if (i, j) in best else text for j, text in enumerate(map(_escape, row))
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def print_table(record: dict[str, Any]) -> None:
    """Print the table of top-1 accuracy on the terminal."""
    grids = {METRICS["top1"].words: rows(record, "top1")}
    print_grids(grids, notes(record, "top1"), markdown(record))


def print_grids(grids: Mapping[str, Grid], remarks: Sequence[str], plain: str) -> None:
    """Print tables by title, and remarks below them, with rich; without rich print `plain`."""
    try:
        from rich.console import Console
        from rich.measure import Measurement
    except ImportError:
        # A bare checkout on a GPU machine.
        print(plain)
        return
    console = Console()
    for title, grid in grids.items():
        turned = _turned(grid)
        forms = [
            _drawn(title, grid),
            _drawn(title, turned, narrow=True),
            _drawn(title, _compact(turned), narrow=True),
        ]
        widths = [
            Measurement.get(console, console.options.update(width=1000), form).maximum
            for form in forms
        ]
        # The first form that fits, or the narrowest: a truncated number is worse than a wrapped
        # line.
        fitting = [i for i, width in enumerate(widths) if width <= console.width]
        chosen = fitting[0] if fitting else widths.index(min(widths))
        Console(width=max(console.width, widths[chosen])).print(forms[chosen])
    for remark in remarks:
        console.print(remark, markup=False, highlight=False)


def _turned(grid: Grid) -> Grid:
    """Transpose; a name of several words takes several lines."""
    header, table, best = grid
    names = ["", *(row[0].replace(" ", "\n") for row in table)]
    return (
        names,
        [[header[j], *(row[j] for row in table)] for j in range(1, len(header))],
        {(j - 1, i + 1) for i, j in best},
    )


def _compact(grid: Grid) -> Grid:
    """Remove the spaces around ± and break names at colons too."""
    header, table, best = grid
    names = [name.replace(":", ":\n") for name in header]
    return names, [[row[0], *(text.replace(" ± ", "±") for text in row[1:])] for row in table], best


def _drawn(title: str, grid: Grid, narrow: bool = False) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    header, table, best = grid
    drawn = (
        Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        if narrow
        else Table(title=title)
    )
    for i, name in enumerate(header):
        drawn.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    for i, row in enumerate(table):
        drawn.add_row(
            *(Text(text, style="bold" if (i, j) in best else "") for j, text in enumerate(row))
        )
    return drawn


def computed_on(facts: Mapping[str, Any]) -> str:
    """Describe the GPUs, or the processor and its threads. facts: of `loggers.environment`."""
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    several = facts.get("side_by_side", 1)
    together = f", {several} runs side by side" if several > 1 else ""
    gpus = ", ".join(str(gpu["name"]) for gpu in facts["gpus"])
    return (gpus or f"{facts['cpu']}, {threads}") + together


@program
def main(arguments: Sequence[str]) -> None:
    if not arguments or len(arguments) > 2 or (len(arguments) == 2 and arguments[1] not in METRICS):
        raise UsageError(
            f"usage: python -m dad_fast.evaluation.tables RESULTS.json [{'|'.join(METRICS)}]"
        )
    record, metric = read_record(arguments[0]), *(arguments[1:] or ["top1"])
    values = [value_of(run, suite, metric) for run in record["runs"] for suite in run["suites"]]
    if all(value is None for value in values):
        raise DataError(
            f"{arguments[0]}: none of its results has {METRICS[metric].words}; "
            f"the others are {', '.join(METRICS)}"
        )
    print(markdown(record, metric))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
