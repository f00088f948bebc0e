"""Which cells of a sweep can learn from the same stored adversarial images or teacher outputs, and what those stores are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

from dad_fast.config.ablation import Plan, SharedStore
from dad_fast.config.fields import get, settings, with_values
from dad_fast.config.launch import StoreLaunch
from dad_fast.config.resolve import check
from dad_fast.config.schema import Config
from dad_fast.config.variants import NOT_SCIENCE

KINDS = ("adversarial", "targets")
_METHODS = {"adversarial": ("aug-only", "dad", "dat+dad"), "targets": ("kd", "dad", "dat+dad")}  # that can learn from a kind
_SECTIONS = {  # settings that decide a store's content; the student's name and arguments give the size of its images
    "adversarial": ("data", "augment", "teacher", "discretizer", "attack", "precision"),
    "targets": ("data", "augment", "teacher", "precision"),
}
_SETTINGS = ("seed", "student.name", "student.model_kwargs", "engine.savings")


def with_stores(plan: Plan, kinds: Sequence[str], folder: str, views: int, images: str) -> Plan:
    """`plan`, checked, with stores in `folder` for every cell that can learn from one of these `kinds`; each store is there once.

    views: draws per image; 0 = one of adversarial images, and one for each epoch of teacher outputs.
    """
    stores: dict[str, SharedStore] = {}
    variants = dict(plan.config.variants)
    base = with_values(plan.config, {"variants": {}, "seeds": 1})
    for name, changes in plan.config.variants.items():
        cell = with_values(base, changes)
        dirs = []
        for kind in (kind for kind in KINDS if kind in kinds and cell.method in _METHODS[kind]):
            targets = kind == "targets"
            epochs = math.ceil(cell.schedule.epochs + cell.schedule.cooldown_epochs)
            num_views = views or (epochs if targets else 1)
            path = f"{folder}/{kind}-{_digest(cell, kind, num_views, images)}"
            launch = StoreLaunch(output=path, targets=targets, views=num_views, images="none" if targets else images)
            stores.setdefault(path, SharedStore(path, kind, cell, launch))
            dirs.append(path)
        if dirs:
            variants[name] = {**changes, "store.dirs": tuple(dirs)}
    check(with_values(base, {"seeds": 1, **variants[plan.base]}))  # first, for what is wrong with it is wrong with every cell
    config = with_values(plan.config, {"variants": variants})
    check(config)
    return replace(plan, config=config, stores=tuple(stores.values()))


def _digest(cfg: Config, kind: str, views: int, images: str) -> str:
    paths = [p for p in settings() if (p in _SETTINGS or p.partition(".")[0] in _SECTIONS[kind]) and p not in NOT_SCIENCE]
    text = repr([(path, get(cfg, path)) for path in paths] + [views, images])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
