"""The step from which several runs can resume together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dad_fast.checkpoint.folder import CheckpointFolder


def resume_steps(
    folders: Sequence[CheckpointFolder], log: Callable[[str], None]
) -> list[int | None]:
    """Return for each run the step to resume from; None = its beginning.

    It is one step for all: the newest of which every run has a sound checkpoint. Runs without such
    a step, such as one that was begun before the others, resume from their own newest checkpoints.
    `log` gets lines about damaged checkpoints.
    """
    candidates = [folder.steps() for folder in folders]
    common = set.intersection(*map(set, candidates))
    for step in sorted(common, reverse=True):
        if all(folder.is_sound(step, log) for folder in folders):
            return [step] * len(folders)
    return [
        next((step for step in steps if folder.is_sound(step, log)), None)
        for folder, steps in zip(folders, candidates, strict=True)
    ]
