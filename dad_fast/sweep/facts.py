"""run.json: what a run resolved to, its models and stores, and the commands that trained it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dad_fast.config import Launch
from dad_fast.data.sources.base import Source
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.build import Components
from dad_fast.engine.trainer import Trainer
from dad_fast.files import atomic_write_json
from dad_fast.kernels.csrc import csrc_status
from dad_fast.loggers.environment import environment
from dad_fast.models.ensemble import Ensemble


def write_facts(trainer: Trainer, variant: str, launch: Launch, sharing: Sequence[str]) -> None:
    """Write run.json of a run that begins or resumes.

    sharing: labels of the runs that learn from the same batches, without this one.
    """
    parts, path = trainer.parts, trainer.output / "run.json"
    kernels = {"csrc": csrc_status()}
    if parts.discretizer is not None and parts.discretizer.backend:
        kernels["codebook_search"] = parts.discretizer.backend
    resolved = {
        "kernels": kernels,
        "loader": trainer.loader.name,
        "processes": distributed.world(),
        "data": {"train": _about(parts.train), "val": _about(parts.val)},
        "choices": {name: choice.record() for name, choice in trainer.choices.items()},
    }
    if launch.resume and trainer.shared_by > 1 + len(sharing):
        # The others are done or failed. Its seconds are still those of a run that shared.
        sharing = _earlier(path, "shares_batches_with") or sharing
    if sharing:
        resolved["shares_batches_with"] = list(sharing)
    names = {"variant": variant, "preset": launch.preset}
    earlier = _earlier(path, "commands") if launch.resume else []
    # Each command line once, in order.
    started = {"commands": list(dict.fromkeys(filter(None, (*earlier, launch.command))))}
    facts = {**resolved, **names, **started, **_weights(parts)}
    atomic_write_json(path, environment() | facts)


def _earlier(path: Path, key: str) -> list[str]:
    """Return a list of the run.json of an earlier start; [] if it cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return list(map(str, json.loads(path.read_text())[key]))
    return []


def _about(source: Source) -> dict[str, str]:
    return {"images": source.describe(), "fingerprint": source.fingerprint}


def _weights(parts: Components) -> dict[str, Any]:
    """Return the frozen models and stores of a run, for run.json."""
    frozen = {"teacher": parts.teacher, "discretizer": parts.discretizer}
    found: dict[str, Any] = {
        name: {"name": part.name, "sha256": part.weights_sha256, "seen": part.provenance}
        for name, part in frozen.items()
        if part is not None
    }
    if isinstance(parts.teacher, Ensemble):
        found["teacher"] |= {
            "average": parts.teacher.average,
            "members": [
                {
                    "name": member.name,
                    "weight": weight,
                    "sha256": member.weights_sha256,
                    "loaded_sha256": parts.hashes[f"teacher {number}"],
                    "seen": member.provenance,
                }
                for number, (weight, member) in enumerate(parts.teacher.weighted_members(), start=1)
            ],
        }
    stores = parts.stored.stores
    if stores:
        found["stores"] = [
            {"folder": str(s.folder), "kind": s.kind, "views": s.num_views, "sha256": s.checksum}
            for s in stores
        ]
        found["teacher_loaded"] = parts.teacher is not None
    return found
