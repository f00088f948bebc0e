"""Compare a checkpoint with the run that resumes from it: settings, data, classes, stores and
frozen models.

Files may have moved: their content is compared. If the device, the number of threads or the version
of torch changed, frozen models are compared by their files alone, because a head made from prompts
then differs in its last bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dad_fast.checkpoint.folder import Checkpoint
from dad_fast.checkpoint.run import TrainRun
from dad_fast.config import Config, differences, from_toml
from dad_fast.config.fields import get, with_values
from dad_fast.config.variants import with_batch_sizes
from dad_fast.data.augment.pixmix import picture_fingerprint
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.choose import ALIASES
from dad_fast.distributed import process_group as distributed
from dad_fast.models.registry import split_names

CONTENT_COMPARED = ("data.data_dir", "data.class_map", "store.dirs", "augment.pixmix_pictures")
# Compared by content and by the file's name, which may tell what the content does not.
NAME_COMPARED = ("teacher.name", "teacher.head", "discretizer.name")


def identity(run: TrainRun) -> dict[str, Any]:
    """Return what a checkpoint records of a run's data and models, as JSON."""
    parts = run.parts
    settled = parts.choices.settled(run.cfg)
    frozen = {"teacher": parts.teacher, "discretizer": parts.discretizer}
    models = {
        name: {"weights": parts.hashes.get(name), "file": model.weights_sha256}
        for name, model in frozen.items()
        if model is not None
    }
    return {
        "classes": parts.train.classes.to_json(),
        "data": {"train": parts.train.fingerprint, "val": parts.val.fingerprint},
        "pictures": picture_fingerprint(run.cfg.augment.pixmix_pictures),
        "stores": parts.stored.checksums,
        "models": models,
        "computed": _computed(parts.device),
        "switches": {path: bool(get(settled, path)) for path in parts.choices.autos},
        "world": distributed.world(),
        "loader": run.loader.name,
    }


def config_of(found: Checkpoint) -> Config:
    """Return the settings that the checkpoint was made with."""
    return with_batch_sizes(from_toml(found.state["config"], str(found.path)), found.state["world"])


def changes(run: TrainRun, found: Checkpoint) -> list[str]:
    """List the settings, data and models that differ from those of the checkpoint and would change
    the result.
    """
    cfg, state = run.cfg, found.state
    before, now = config_of(found), identity(run)
    # "auto" equals what it means here, so that an old "off" is no change on a CPU.
    settled = run.parts.choices.settled
    changed = differences(settled(_elsewhere(before, cfg)), settled(cfg))
    old_size, new_size = before.data.batch_size, cfg.data.batch_size
    has_own_statistics = run.parts.student.has_batch_stats and not cfg.student.sync_bn
    if old_size != new_size and has_own_statistics:
        sizes = f"{old_size} images at a time in each of {state['world']} processes, now {new_size}"
        changed.append(
            f"data.batch_size: batch norm saw {sizes} (--grad-accum-steps can make up for fewer "
            "processes)"
        )
    if state["classes"] != now["classes"]:
        changed.append(f"the classes ({_first_class(state['classes'], now['classes'])})")
    if state["stores"] != now["stores"]:
        changed.append(
            f"the stores {', '.join(cfg.store.dirs) or '(none now)'} are not those that the run "
            "began with"
        )
    if state.get("pictures", "") != now["pictures"]:
        folder = cfg.augment.pixmix_pictures or "(none now)"
        changed.append(f"the pictures in {folder} are not those that the run began with")
    for split, name in (("train", cfg.data.train_split), ("val", cfg.data.val_split)):
        if state["data"][split] != now["data"][split]:
            changed.append(
                f"the images in {cfg.data.data_dir} {name} are not those that the run began with"
            )
    compared = "weights" if state["computed"] == now["computed"] else "file"
    for name, hashes in now["models"].items():
        old_hash, new_hash = state["models"].get(name, {}).get(compared), hashes[compared]
        if old_hash and new_hash and old_hash != new_hash:
            changed.append(
                f"the weights of the {name} {get(cfg, f'{name}.name')} are not those that the run "
                "began with"
            )
    return changed


def notes(run: TrainRun, found: Checkpoint) -> list[str]:
    """List the differences from the checkpoint that change a result only slightly, for the log."""
    lines = []
    before, now = found.state["computed"], _computed(run.parts.device)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        texts = [f"{name} {before.get(name)} → {now[name]}" for name in changed]
        lines.append(
            f"the run began with another {', another '.join(texts)}: from here on it equals an "
            "uninterrupted run up to rounding"
        )
    switches = identity(run)["switches"]
    for path, was in found.state.get("switches", {}).items():
        if switches.get(path, was) != was:
            lines.append(
                f"{path} was {'on' if was else 'off'} where the run began and is "
                f"{'off' if was else 'on'} here"
            )
    loader = ALIASES.get(found.state["loader"], found.state["loader"])
    if loader != run.loader.name:
        lines.append(
            f"the run began with the loader {loader}; the pixels of "
            f"{run.loader.name} differ slightly"
        )
    return lines


def _computed(device: torch.device) -> dict[str, Any]:
    """Return what the last bits of a result depend on besides the settings."""
    name = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "torch": torch.__version__,
        "device": name,
        "number of threads": torch.get_num_threads(),
    }


def _elsewhere(before: Config, cfg: Config) -> Config:
    """Return `before` with the paths of `cfg` for files that only moved, judging by their names."""

    def file_names(settings: Config, path: str) -> list[str]:
        return [Path(name).name for name in split_names(get(settings, path))]

    moved = [path for path in NAME_COMPARED if file_names(before, path) == file_names(cfg, path)]
    return with_values(before, {path: get(cfg, path) for path in (*CONTENT_COMPARED, *moved)})


def _first_class(was: str, now: str) -> str:
    """Describe the first class that differs, or the two numbers of classes."""
    old, new = ClassMap.from_json(was), ClassMap.from_json(now)
    for (i, *before), (_, *after) in zip(old, new, strict=False):
        if before != after:
            return f"{i}: {' '.join(before)} → {' '.join(after)}"
    return f"{len(old)} → {len(new)}"
