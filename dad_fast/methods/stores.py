"""Stores that a run asks for (`--stores`): which it can learn from, and where several runs share
one. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from dad_fast.config.fields import get, nearest, settings, with_values
from dad_fast.config.options import StoreLaunch
from dad_fast.config.schema import Config
from dad_fast.config.variants import RESUME_SAFE
from dad_fast.errors import UsageError
from dad_fast.methods.registry import METHODS
from dad_fast.models.registry import teacher_settings

KINDS = ("adversarial", "targets")
# Settings that decide what a store holds.
_SECTIONS = {
    "adversarial": ("data", "augment", "teacher", "discretizer", "attack", "precision"),
    "targets": ("data", "augment", "teacher", "precision"),
}
_SETTINGS = ("seed", "engine.savings")
# With all of these set, images have one view whatever the student.
VIEW = ("augment.img_size", "augment.crop_pct", "augment.interpolation")
_STUDENT = ("student.name", "student.model_kwargs")


@dataclass(frozen=True)
class SharedStore:
    """A store to fill before the runs that learn from it.

    config: a run that learns from it, online and with the first seed.
    """

    folder: str
    kind: str
    config: Config
    launch: StoreLaunch


def check_stores(cfg: Config) -> None:
    """Raise UsageError unless `--stores` and `--store-images` name what can be made."""
    for text in cfg.store.make:
        kind, colon, views = text.partition(":")
        if kind not in KINDS:
            known = f"(kinds: {', '.join(KINDS)})"
            raise UsageError(f"--stores {text}: no such kind{nearest(kind, KINDS)} {known}")
        if colon and not (views.isdecimal() and int(views)):
            raise UsageError(
                f"--stores {text}: views are a whole number, 1 or more, as in {kind}:4"
            )
    form = cfg.store.images
    quality = form.removeprefix("jpeg:")
    is_jpeg = form != quality and quality.isdecimal() and 1 <= int(quality) <= 100
    if form not in ("none", "raw", "webp") and not is_jpeg:
        choices = "none, raw, webp or jpeg:Q with a quality from 1 to 100"
        raise UsageError(f"--store-images {form}: must be {choices}")
    if cfg.store.make and cfg.store.dirs:
        raise UsageError(
            "--store and --stores: give stores that exist or let this run make them; leave one out"
        )


def usable_kinds(cfg: Config) -> dict[str, int]:
    """Return kind -> views per image for the kinds in `store.make` that the method learns from."""
    epochs = math.ceil(cfg.schedule.epochs + cfg.schedule.cooldown_epochs)
    default = {"adversarial": 1, "targets": epochs}
    asked = dict(text.partition(":")[::2] for text in cfg.store.make)
    return {
        kind: int(asked[kind] or default[kind])
        for kind in METHODS[cfg.method].store_kinds
        if kind in asked
    }


def with_stores(cfg: Config, folder: Path, first_seed: int) -> tuple[Config, list[SharedStore]]:
    """Return `cfg` as a run that learns from the stores it asks for, and these stores in `folder`.

    The name of a store has a hash of what it holds, so that runs with equal needs share it.
    first_seed: all seeds of a comparison learn from the draws of this one.
    """
    resolved = {"store.make": (), "store.images": Config().store.images}
    without = with_values(cfg, {**resolved, "seed": first_seed})
    stores = []
    for kind, views in usable_kinds(cfg).items():
        images = "none" if kind == "targets" else cfg.store.images
        path = str(folder / f"{kind}-{_digest(without, kind, views, images)}")
        launch = StoreLaunch(output=path, targets=kind == "targets", views=views, images=images)
        stores.append(SharedStore(path, kind, online(without), launch))
    dirs = tuple(store.folder for store in stores) or cfg.store.dirs
    return with_values(cfg, {**resolved, "store.dirs": dirs}), stores


def online(cfg: Config) -> Config:
    """Return `cfg` without stores, for checks and measurements before they are filled."""
    return with_values(cfg, {"store.dirs": (), "store.mix_outputs": False, "loss.form": "paper"})


def is_filled(folder: str) -> bool:
    """True if the store in `folder` is complete by its manifest.

    Readers of the store find damage.
    """
    try:
        return bool(json.loads((Path(folder) / "manifest.json").read_text())["shards"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def seconds_file(folder: str) -> Path:
    """Return the file next to a store that records the seconds of filling it."""
    return Path(f"{folder}.json")


def store_seconds(folder: str) -> float:
    """Return the seconds of filling a store; 0 if not recorded, as by `dad-fast precompute`."""
    try:
        return float(json.loads(seconds_file(folder).read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0.0


def _digest(cfg: Config, kind: str, views: int, images: str) -> str:
    chosen = _SETTINGS if all(get(cfg, path) for path in VIEW) else (*_SETTINGS, *_STUDENT)
    used = [
        path
        for path in settings()
        if (path in chosen or path.partition(".")[0] in _SECTIONS[kind]) and path not in RESUME_SAFE
    ]
    # An ensemble has outputs of its own at every temperature.
    temperature = teacher_settings(cfg)[1:]
    text = repr([(path, get(cfg, path)) for path in used] + [views, images, *temperature])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
