"""Comparison of methods with plain distillation: fair partners, and a verdict with its uncertainty.

A difference counts as measured if its 95 % interval excludes 0. With two common seeds or more the
interval is over seeds, paired (Student's t); otherwise it is over the test images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from dad_fast.methods.registry import BASELINE
from dad_fast.report.intervals import Difference, difference, unpaired
from dad_fast.report.run_files import machine, number
from dad_fast.report.runs import Group

# Relative differences that still count as equal.
EQUAL_EPOCHS, EQUAL_TIME = 0.02, 0.15
# Verdicts of a page, and suites that one names with their numbers.
MAX_VERDICTS, MAX_NAMED = 3, 4
# From this many comparisons on, a note says how many intervals exclude 0 by chance.
MANY = 10


class Compared(NamedTuple):
    suite: str
    difference: Difference
    seeds: int  # common seeds of a paired interval; 0 for an interval over the test images


def fairness(groups: Sequence[Group]) -> list[str]:
    """Name, for each method that costs more than KD, the KD runs of equal epochs and equal time.

    Time is training and filling the stores that the run learns from.
    """
    equal_epochs: dict[str, list[str]] = {}
    equal_time: dict[str, list[str]] = {}
    alone = []
    for group in groups:
        baselines = [
            other
            for other in groups
            if other.method == BASELINE and other.finished and _machines(other) == _machines(group)
        ]
        if group.is_plain or not group.finished or not baselines:
            continue
        timed = False
        for other in baselines:
            seconds = _ratio(group, other, "seconds", "store_seconds")
            times = group.label
            if seconds is not None:
                times = f"{group.label} ({seconds:.2g} times its time)"
            if _is_equal(_ratio(group, other, "epochs"), EQUAL_EPOCHS):
                equal_epochs.setdefault(other.label, []).append(times)
            if _is_equal(seconds, EQUAL_TIME):
                equal_time.setdefault(other.label, []).append(times)
                timed = True
        if not timed:
            alone.append(group.label)
    lines = [
        f"At equal epochs, compare with {name}: {', '.join(found)}."
        for name, found in equal_epochs.items()
    ]
    lines += [
        f"At equal time, compare with {name}: {', '.join(found)}."
        for name, found in equal_time.items()
    ]
    if alone:
        lines.append(
            f"No KD run here took as long as {' or '.join(alone)}: "
            "part of a gain over KD may be longer training."
        )
    return lines


def verdicts(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """Return one sentence per compared group, and notes on how to read them."""
    pairs = _pairs(groups)
    sentences, all_found = [], []
    for group, base, condition in pairs:
        found = compare(group, base)
        if found:
            sentences.append(_sentence(group.label, base.label, condition, found))
            all_found += found
    if not sentences:
        return [], []

    notes = []
    if any(one.seeds for one in all_found):
        notes.append(
            "Verdict: mean difference of top-1 over seeds of the student, paired by seed "
            "(Student's t), for these test images, this teacher and this discretizer. "
            "No measurable difference: the 95 % interval contains 0."
        )
    if any(not one.seeds for one in all_found):
        notes.append(
            "One common seed: the interval covers other test images, and not other seeds, which "
            "may give another result; compare three seeds or more (`--seeds 3`)."
        )
    if len(all_found) >= MANY:
        notes.append(
            f"Of {len(all_found)} intervals about {0.05 * len(all_found):.0f} exclude 0 by chance."
        )
    return sentences, notes


def compare(group: Group, base: Group) -> list[Compared]:
    """Compare two groups on every suite that all their finished seeds were evaluated on.

    Suites with different numbers of images are left out: they are not the same images.
    """
    found = []
    runs, base_runs = group.finished, base.finished
    for suite in runs[0]["suites"]:
        if not all(suite in run["suites"] for run in (*runs, *base_runs)):
            continue
        here = [run["suites"][suite] for run in runs]
        there = [run["suites"][suite] for run in base_runs]
        if len({number(result, "num_images") for result in (*here, *there)}) != 1:
            continue
        if not all(0 <= result["top1"] <= 100 for result in (*here, *there)):
            continue
        paired = difference(base_runs, runs, suite)
        if paired is not None and paired.interval is not None:
            found.append(Compared(suite, paired, len(paired.pairs)))
            continue
        over_images = unpaired(there, here)
        if over_images is not None:
            found.append(Compared(suite, over_images, 0))
    return found


def _pairs(groups: Sequence[Group]) -> list[tuple[Group, Group, str]]:
    """Return what to compare: groups with their baseline, and the condition in words.

    The baselines are the KD groups, else the plain ones, else the first group of the page.
    """
    finished = [group for group in groups if group.finished]
    bases = [group for group in finished if group.method == BASELINE]
    bases = bases or [group for group in finished if group.is_plain] or finished[:1]
    others = [group for group in finished if group not in bases]
    # CE is a baseline too, unless it is all that is left.
    candidates = [group for group in others if not group.is_plain] or others
    if not candidates:
        bases, candidates = bases[:1], bases[1:]
    if len(candidates) > MAX_VERDICTS:
        candidates = sorted(candidates, key=_mean_of_suites, reverse=True)[:MAX_VERDICTS]
    return [(group, *_partner(group, bases)) for group in candidates]


def _partner(group: Group, bases: Sequence[Group]) -> tuple[Group, str]:
    """Return the base of equal time, else of equal epochs, else of the nearest time.

    Also return the condition in words, "" where times and epochs are unknown.
    """
    times = {
        base.label: _ratio(group, base, "seconds", "store_seconds")
        for base in bases
        if _machines(base) == _machines(group)
    }
    for base in bases:
        if _is_equal(times.get(base.label), EQUAL_TIME):
            return base, "equal training time"

    for base in bases:
        if _is_equal(_ratio(group, base, "epochs"), EQUAL_EPOCHS):
            ratio = times.get(base.label)
            return base, "equal epochs" + (f", in {ratio:.2g} × its training time" if ratio else "")

    known = {label: ratio for label, ratio in times.items() if ratio}
    if not known:
        return bases[0], ""
    nearest = min(known, key=lambda label: abs(math.log(known[label])))
    base = next(base for base in bases if base.label == nearest)
    return base, f"in {known[nearest]:.2g} × its training time"


def _mean_of_suites(group: Group) -> float:
    found = [one["top1"] for record in group.finished for one in record["suites"].values()]
    return statistics.fmean(found) if found else -math.inf


def _sentence(name: str, base: str, condition: str, found: Sequence[Compared]) -> str:
    better = sorted(
        (one for one in found if _bounds(one)[0] > 0), key=lambda one: -one.difference.mean
    )
    worse = sorted(
        (one for one in found if _bounds(one)[1] < 0), key=lambda one: one.difference.mean
    )
    same = [one.suite for one in found if one not in better and one not in worse]
    against = f"{base} ({condition})" if condition else base
    parts = []
    if better:
        verb = "beats" if all(one.seeds for one in better) else "scores higher than"
        parts.append(f"{name} {verb} {against} on {_listed(better)}")
    if worse:
        is_certain = all(one.seeds for one in worse)
        start = f"{name} {'loses to' if is_certain else 'scores lower than'} {against}"
        if better:
            start = "it loses" if is_certain else "it scores lower"
        parts.append(f"{start} on {_listed(worse)}")
    if same:
        between = "" if parts else f" between {name} and {against}"
        parts.append(f"no measurable difference{between} on {_names(same)}")
    words = "; ".join(parts)
    if not better and not worse:
        words = f"{words[0].upper()}{words[1:]} ({_seeds(found[0])})"
    return f"{words}."


def _listed(found: Sequence[Compared]) -> str:
    """List suites with their differences; the first names its interval and seeds in full."""
    words = []
    is_first = True
    for one in found[:MAX_NAMED]:
        low, high = sorted(map(abs, _bounds(one)))
        # A bound above 0 is not shown as 0.0.
        digits = 1 if low >= 0.05 else 2
        bounds = f"{low:.{digits}f} to {high:.{digits}f}"
        size = f"{one.suite} by {abs(one.difference.mean):.{digits}f}"
        if is_first:
            words.append(f"{size} points (95 % interval {bounds}, {_seeds(one)})")
        else:
            words.append(f"{size} ({bounds})")
        is_first = False
    more = len(found) - MAX_NAMED
    if more > 0:
        words.append(f"{more} more suite{'s' if more > 1 else ''}")
    return _joined(words)


def _names(names: Sequence[str]) -> str:
    shown = list(names[: 2 * MAX_NAMED])
    more = len(names) - len(shown)
    return _joined([*shown, f"{more} more suites"] if more else shown)


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _bounds(one: Compared) -> tuple[float, float]:
    assert one.difference.interval is not None
    return one.difference.interval


def _seeds(one: Compared) -> str:
    return f"{one.seeds} seeds" if one.seeds else "over test images, one common seed"


def _machines(group: Group) -> set[tuple[str, int]]:
    """Return the machines of a group's runs, and the number of runs that shared their batches."""
    return {(machine(run.facts), run.shared_by) for run in group.runs}


def _is_equal(ratio: float | None, tolerance: float) -> bool:
    return ratio is not None and abs(ratio - 1) <= tolerance


def _ratio(group: Group, other: Group, key: str, *more: str) -> float | None:
    """Return the ratio of two groups' means of a record's number, plus the numbers of `more`."""
    means = []
    for one in (group, other):
        values = [number(record, key) for record in one.finished]
        if None in values or not sum(filter(None, values)):
            return None
        added = [number(record, name) or 0.0 for record in one.finished for name in more]
        means.append((sum(filter(None, values)) + sum(added)) / len(values))
    return means[0] / means[1]


def mean_top1(results: Sequence[dict[str, Any]]) -> float:
    """Return the mean top-1 of results on one suite, one per seed."""
    return statistics.fmean(float(result["top1"]) for result in results)


def best_per_suite(suites: Sequence[str], by_variant: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return "SUITE VARIANT TOP1" of the variant with the highest mean on each suite.

    Suites that only one variant was evaluated on are left out.
    """
    found = []
    for suite in suites:
        means = {
            name: mean_top1([run["suites"][suite] for run in runs])
            for name, runs in by_variant.items()
            if all(suite in run["suites"] for run in runs)
        }
        if len(means) > 1:
            best = max(means, key=lambda name: means[name])
            found.append(f"{suite}: {best} {means[best]:.1f}")
    return found
