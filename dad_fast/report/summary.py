"""Headline of the page: the verdict, what was trained, when and by which command, what is best."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from dad_fast.evaluation.tables import suites, variants
from dad_fast.report.intervals import MIN_SEEDS, interval
from dad_fast.report.markup import comparison, notes, preformatted, text, visible
from dad_fast.report.run_files import number
from dad_fast.report.runs import Group
from dad_fast.report.verdict import best_per_suite, mean_top1, verdicts

# Commands, suites and names that are listed.
MAX_LISTED = 12
# Seconds after which a time stamp is no date.
LATEST = 4e9


def headline(groups: Sequence[Group], record: dict[str, Any]) -> list[str]:
    """Return the HTML fragments of the headline. record: of `Loaded`."""
    sentences, remarks = verdicts(groups)
    if len(groups) == 1:
        sentences = _alone(groups[0])
    rows = [
        ("trained", _trained(groups)),
        ("when", _when(groups)),
        ("highest top-1, %", _best(record)),
    ]
    filled = [(name, [words]) for name, words in rows if words]
    commands = _commands(groups)
    # In lines that scroll: a wrapped line would break flags at their hyphens.
    block = f'<pre tabindex="0">{preformatted(commands)}</pre>' if commands else ""
    return [
        *(f'<p class="verdict">{_unbroken(sentence)}</p>' for sentence in sentences),
        comparison([""], filled),
        block,
        notes(remarks),
    ]


def _unbroken(sentence: str) -> str:
    """Escape `sentence`, with a number and its unit on one line."""
    return text(sentence.replace(" %", "\u00a0%").replace(" ×", "\u00a0×"))


def _alone(group: Group) -> list[str]:
    """Return a sentence on the only group of a page: its first suite and its lowest one."""
    runs = group.finished
    if not runs or not runs[0]["suites"]:
        return []
    by_suite = {
        suite: [run["suites"][suite] for run in runs if suite in run["suites"]]
        for suite in runs[0]["suites"]
    }
    teacher = (runs[0]["teacher"] or {}).get("suites", {})
    first, *others = by_suite
    words = _result(first, by_suite[first], teacher)
    if others:
        lowest = min(others, key=lambda suite: mean_top1(by_suite[suite]))
        which = "lowest of the other suites, " if len(others) > 1 else ""
        words += f"; {which}{_result(lowest, by_suite[lowest], teacher)}"
    count = len(runs)
    seeds = f"{count} seeds" if count > 1 else "one seed"
    over = "seeds" if count >= MIN_SEEDS else "test images"
    return [f"{group.label}: {words} ({seeds}; intervals over {over})."]


def _result(suite: str, results: Sequence[dict[str, Any]], teacher: dict[str, Any]) -> str:
    bounds = interval(results)
    details = [f"95 % interval {bounds[0]:.1f} to {bounds[1]:.1f}"] if bounds else []
    theirs = number(teacher.get(suite, {}), "top1")
    details += [f"teacher {theirs:.1f}"] if theirs is not None else []
    words = f"{mean_top1(results):.1f} % on {suite}"
    return f"{words} ({', '.join(details)})" if details else words


def _trained(groups: Sequence[Group]) -> str:
    trained = [group for group in groups if group.method != "evaluated"]
    students = _distinct(_student(group) for group in trained)
    if not students:
        return ""
    words = [_listed(students)]
    data = _distinct(group.setting("data.data_dir") for group in trained)
    words += [f"on {_listed(data)}"] if data else []
    words.append(f"by {_listed(_distinct(group.method for group in trained))}")
    teachers = _distinct(
        record["teacher"]["name"]
        for group in trained
        for record in group.finished
        if record["teacher"]
    )
    parts = [" ".join(words), *([f"teacher {_listed(teachers)}"] if teachers else [])]
    runs = sum(len(group.runs) for group in trained)
    return "; ".join([*parts, f"{runs} run{'s' if runs > 1 else ''}"])


def _student(group: Group) -> Any:
    recorded = next((record.get("student") for record in group.finished), None)
    return group.setting("student.name") or recorded


def _when(groups: Sequence[Group]) -> str:
    """Return the times of the first and the last line of the logs."""
    found = [number(row, "time") for group in groups for run in group.runs for row in run.rows]
    times = [moment for moment in found if moment is not None and 0 < moment < LATEST]
    if not times:
        return ""
    first, last = (time.gmtime(moment) for moment in (min(times), max(times)))
    start = time.strftime("%Y-%m-%d %H:%M", first)
    end = time.strftime("%Y-%m-%d %H:%M", last)
    if start == end:
        return f"{start} UTC"
    same_day = start[:10] == end[:10]
    return f"{start} to {end[11:] if same_day else end} UTC"


def _commands(groups: Sequence[Group]) -> str:
    found = _distinct(
        command
        for group in groups
        for run in group.runs
        for command in _list(run.facts.get("commands"))
    )
    return _listed([visible(command) for command in found], "\n")


def _best(record: dict[str, Any]) -> str:
    if not record["runs"]:
        return ""
    return _listed(best_per_suite(suites(record), variants(record)), " · ")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = len(names) - MAX_LISTED
    shown = [*names[:MAX_LISTED], *([f"{more} more"] if more > 0 else [])]
    return between.join(shown)
