"""Whether a checkpoint is of the run that would go on from it: its settings, data, classes, stores and frozen models.

Files may lie elsewhere than before; what is in them is compared. Where the device, the number of threads or the version of torch is another
one, frozen models are compared by their files alone, for a head made from prompts then differs in its last bits, as all else does.
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
from dad_fast.data.classes import ClassMap
from dad_fast.distributed import process_group as distributed

CONTENT_COMPARED = ("data.data_dir", "data.class_map", "store.dirs")
NAME_COMPARED = (
    "teacher.name",
    "teacher.head",
    "discretizer.name",
)  # and the content; the name may say what the file does not


def identity(run: TrainRun) -> dict[str, Any]:
    """For a checkpoint, as JSON can hold it."""
    parts = run.parts
    frozen = {"teacher": parts.teacher, "discretizer": parts.discretizer}
    files = {name: part.weights_sha256 for name, part in frozen.items() if part is not None}
    return {
        "classes": parts.train.classes.to_json(),
        "data": {"train": parts.train.fingerprint, "val": parts.val.fingerprint},
        "stores": parts.stored.checksums,
        "models": {
            name: {"weights": parts.hashes.get(name), "file": file} for name, file in files.items()
        },
        "computed": _computed(parts.device),
        "world": distributed.world(),
        "loader": run.loader.name,
    }


def config_of(found: Checkpoint) -> Config:
    """The settings that the checkpoint was made with."""
    return with_batch_sizes(from_toml(found.state["config"], str(found.path)), found.state["world"])


def changes(run: TrainRun, found: Checkpoint) -> list[str]:
    """What the run would go on with although it began with something else."""
    cfg, state, before, now = run.cfg, found.state, config_of(found), identity(run)
    changed = differences(_elsewhere(before, cfg), cfg)
    if (
        before.data.batch_size != cfg.data.batch_size
        and run.parts.student.has_batch_stats
        and not cfg.student.sync_bn
    ):
        sizes = f"{before.data.batch_size} images at a time in each of {state['world']} processes, now {cfg.data.batch_size}"
        changed.append(
            f"data.batch_size: batch norm saw {sizes} (--grad-accum-steps can make up for fewer processes)"
        )
    if state["classes"] != now["classes"]:
        changed.append(f"the classes ({_first_class(state['classes'], now['classes'])})")
    if state["stores"] != now["stores"]:
        changed.append(
            f"the stores {', '.join(cfg.store.dirs) or '(none now)'} are not those that the run began with"
        )
    for split, name in (("train", cfg.data.train_split), ("val", cfg.data.val_split)):
        if state["data"][split] != now["data"][split]:
            changed.append(
                f"the images in {cfg.data.data_dir} {name} are not those that the run began with"
            )
    what = "weights" if state["computed"] == now["computed"] else "file"
    for name, is_now in now["models"].items():
        was = state["models"].get(name, {}).get(what)
        if was and is_now[what] and was != is_now[what]:
            changed.append(
                f"the weights of the {name} {get(cfg, f'{name}.name')} are not those that the run began with"
            )
    return changed


def notes(run: TrainRun, found: Checkpoint) -> list[str]:
    """What a run may go on with, and what its user should know all the same."""
    said, was, now = [], found.state["computed"], _computed(run.parts.device)
    if other := [
        f"{name} {was.get(name)} → {now[name]}" for name in now if was.get(name) != now[name]
    ]:
        said.append(
            f"the run began with another {', another '.join(other)}: from here on it is the straight run's up to rounding"
        )
    if found.state["loader"] != run.loader.name:
        said.append(
            f"the run began with the loader {found.state['loader']}; the pixels of {run.loader.name} differ slightly"
        )
    return said


def _computed(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on besides the settings."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    )
    return {
        "torch": torch.__version__,
        "device": name,
        "number of threads": torch.get_num_threads(),
    }


def _elsewhere(before: Config, cfg: Config) -> Config:
    """`before` with the paths of `cfg` where files have only moved, as far as their names can tell."""
    moved = [
        path for path in NAME_COMPARED if Path(get(before, path)).name == Path(get(cfg, path)).name
    ]
    return with_values(before, {path: get(cfg, path) for path in (*CONTENT_COMPARED, *moved)})


def _first_class(was: str, now: str) -> str:
    old, new = (ClassMap.from_json(text) for text in (was, now))
    for (i, *before), (_, *after) in zip(old, new, strict=False):
        if before != after:
            return f"{i}: {' '.join(before)} → {' '.join(after)}"
    return f"{len(old)} → {len(new)}"
