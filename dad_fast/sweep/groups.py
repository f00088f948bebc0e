"""Groups of runs that learn from the same generated batches. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.methods.batches import batch_settings
from dad_fast.sweep.runs import Run, Sweep


def groups(sweep: Sweep, runs: Sequence[Run], share: bool = True) -> list[list[Run]]:
    """Return `runs` in groups that share their batches, in order.

    Students of `--student A B` share always, whatever their image sizes; other runs only if `share`
    and if it changes nothing in their results.
    """
    if not share and not sweep.config.students:
        return [[run] for run in runs]
    any_size = bool(sweep.config.students)
    found: dict[str, list[Run]] = {}
    for run in runs:
        key = repr(sorted(batch_settings(run.cfg, any_size=any_size).items(), key=str))
        found.setdefault(key, []).append(run)
    return list(found.values())


def split(whole: Sequence[Sequence[Run]], count: int) -> list[list[Run]]:
    """Split groups evenly until there are `count`, or no group of several runs is left."""
    parts = [1] * len(whole)
    while sum(parts) < min(count, sum(map(len, whole))):
        largest = max(range(len(whole)), key=lambda i: len(whole[i]) / parts[i])
        parts[largest] += 1
    return [
        list(group[i * len(group) // n : (i + 1) * len(group) // n])
        for group, n in zip(whole, parts, strict=True)
        for i in range(n)
    ]


def halves(group: Sequence[Run]) -> list[list[Run]]:
    """Return the two halves of a group of several runs."""
    return split([group], 2)


def name_of(group: Sequence[Run]) -> str:
    """Return a name for a log line: "a, b and 3 more, seed 0"."""
    first = group[0]
    if len(group) == 1:
        return first.name
    variants = [run.variant for run in group]
    more = f" and {len(variants) - 2} more" if len(variants) > 3 else ""
    shown = ", ".join(variants[: 2 if more else 3])
    return f"{shown}{more}, seed {first.seed}"
