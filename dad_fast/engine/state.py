"""What a checkpoint holds of a run, and how a run takes it up again: nothing else is carried over, and nothing of this is left out.

Of several processes the first one saves and loads for all. Weights, optimizer, EMA and running statistics are the same in all of them; of
the generators each has its own. Where the number of processes is another one than before, the global order of the samples goes on as
it was, and processes that were not there before draw their dropout from new seeds.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dad_fast.config import differences, from_toml, to_toml
from dad_fast.config.variants import with_batch_sizes
from dad_fast.data.draws import sample_seeds
from dad_fast.engine import distributed
from dad_fast.engine.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    flatten_optimizer,
    generator_tensors,
    restore_generators,
    restore_optimizer,
)
from dad_fast.errors import UsageError
from dad_fast.observe.runlog import print_line

if TYPE_CHECKING:
    from dad_fast.engine.trainer import Trainer


def seed_generators(seed: int, step: int = 0) -> None:
    """Python's, NumPy's and torch's, for dropout and its kind: in each process another one, in the first `seed` itself."""
    rank = distributed.rank()
    own = seed if rank == 0 and step == 0 else int(sample_seeds(seed, step, np.array([rank]))[0])
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def run_state(run: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, which still are the run's own, and JSON. All processes call it; the first one's result is for all."""
    update, device = run.update, run.parts.device
    optimizer, optimizer_state = flatten_optimizer(update.optimizer)
    tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in run.parts.student.state_dict().items()}
    if update.ema is not None:
        tensors |= {f"ema.{k}": v for k, v in update.ema.module.state_dict().items()}
    tensors |= optimizer | run.meter.tensors() | {"bad_in_a_row": update.bad_in_a_row, "worst_streak": run.worst_streak}
    for name, own in generator_tensors(device).items():
        tensors |= {(f"rank{rank}." if rank else "") + name: state for rank, state in enumerate(distributed.gather_to_main(own))}
    state = {
        "config": to_toml(run.cfg),
        "world": distributed.world(),
        "optimizer": optimizer_state,
        "scaler": update.scaler.state_dict(),
        "best_top1": run.best_top1,
        "validation_due": run.validation_due,
        "train_seconds": run.clock.total,
        "metrics_offset": run.log.offset() if distributed.is_main() else 0,
        "classes": run.parts.train.classes.to_json(),
        "data": run.parts.train.fingerprint,
        "stores": run.parts.checksums,
        "loader": run.loader.name,
        "bad_images": run.gathered_bad_images(),
    }
    return tensors, state


def load_for_all(folder: CheckpointFolder, path: str) -> Checkpoint | None:
    """`CheckpointFolder.load` by the first process, for all of them: the others need not see the folder."""
    found: list[Checkpoint | None] = [None]

    def load() -> Any:
        found[0] = folder.load(path, print_line)
        return None if found[0] is None else [str(found[0].path), found[0].state]

    described = distributed.on_main(load)
    if described is None:
        return None
    return Checkpoint(Path(described[0]), distributed.broadcast_tensors(found[0].tensors if found[0] else None), described[1])


def restore(run: Trainer, found: Checkpoint, allow_config_change: bool) -> None:
    """Raises UsageError where the run would not go on with what it began with, naming every difference."""
    changed = _changes(run, found)
    if changed and not allow_config_change:
        what = "; ".join(changed)
        raise UsageError(f"--resume: not the settings of {found.path}: {what}; restore them, or add --allow-config-change")
    if changed and distributed.is_main():
        print_line(f"going on with other settings than those of {found.path} (--allow-config-change): {'; '.join(changed)}")
    began = found.state.get("loader", run.loader.name)
    if began != run.loader.name and distributed.is_main():
        print_line(f"the run began with the loader {began}; the pixels of {run.loader.name} differ slightly")

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}

    update, device, state = run.update, run.parts.device, found.state
    run.parts.student.load_state_dict(under("student."))
    if update.ema is not None and under("ema."):
        update.ema.module.load_state_dict(under("ema."))
    restore_optimizer(update.optimizer, found.tensors, state["optimizer"])
    update.scaler.load_state_dict(state["scaler"])
    for name, own in (("bad_in_a_row", update.bad_in_a_row), ("worst_streak", run.worst_streak)):
        own.copy_(found.tensors.get(name, torch.zeros(())))
    if state.get("world", 1) == distributed.world():
        rank = distributed.rank()
        restore_generators(under(f"rank{rank}.") if rank else found.tensors, device)
    else:
        seed_generators(run.cfg.seed, state["step"])
    run.meter.restore(found.tensors, device)
    run.next_step, run.best_top1, run.validation_due = state["step"], state["best_top1"], state.get("validation_due", False)
    run.clock.total = state["train_seconds"]
    run.loader.replaced[:] = state.get("bad_images", [])


def _changes(run: Trainer, found: Checkpoint) -> list[str]:
    """What the run would go on with although it began with something else."""
    cfg, state = run.cfg, found.state
    world = state.get("world", 1)
    before = with_batch_sizes(from_toml(state["config"], str(found.path)), world)
    changed = differences(before, cfg)
    if before.data.batch_size != cfg.data.batch_size and run.parts.student.has_batch_stats and not cfg.student.sync_bn:
        sizes = f"{before.data.batch_size} images at a time in each of {world} processes, now {cfg.data.batch_size}"
        changed.append(f"data.batch_size: batch norm saw {sizes} (--grad-accum-steps can make up for fewer processes)")
    if state.get("stores", {}) != run.parts.checksums:
        what = "the teacher's answers on the training images" if run.parts.probe else f"the stores {', '.join(cfg.store.dirs)}"
        changed.append(f"{what} are not those that the run began with")
    if state["data"] != run.parts.train.fingerprint:
        changed.append(f"the images in {cfg.data.data_dir} are not those that the run began with")
    return changed
