"""Save the state of a run to a checkpoint, and restore it, so that resume is exact.

With several processes the first one saves and loads for all. Weights, optimizer, EMA and running
statistics are the same in all processes; each has its own random generators. If the number of
processes changed, the global order of the samples continues unchanged, and all processes draw
dropout from new seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dad_fast.checkpoint.compatibility import changes, config_of, identity, notes
from dad_fast.checkpoint.folder import (
    Checkpoint,
    CheckpointFolder,
    generator_tensors,
    restore_generators,
    snapshot,
)
from dad_fast.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from dad_fast.checkpoint.run import TrainRun
from dad_fast.checkpoint.writer import Writer
from dad_fast.config import to_toml
from dad_fast.config.schema import OptimConfig
from dad_fast.distributed import process_group as distributed
from dad_fast.errors import DataError, UsageError
from dad_fast.keyed_random import sample_seeds
from dad_fast.models.weights.files import write_safetensors


class Save(NamedTuple):
    """A state to write: the checkpoint, and then the deletion of old ones."""

    write: Callable[[], None]
    prune: Callable[[int | None], None]


def seed_generators(seed: int, step: int = 0) -> None:
    """Seed Python, NumPy and torch, for dropout and the like: `seed` in the first process, derived
    seeds in the others.
    """
    rank = distributed.rank()
    own = seed if rank == 0 and step == 0 else int(sample_seeds(seed, step, np.array([rank]))[0])
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def run_state(run: TrainRun) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the run's tensors, not copied, and JSON.

    A collective; the first process has the state of all.
    """
    update, device = run.update, run.parts.device
    optimizer, optimizer_state = flatten_optimizer(update.optimizer)
    tensors: dict[str, Tensor] = {
        f"student.{k}": v for k, v in run.parts.student.state_dict().items()
    }
    if update.ema is not None:
        tensors |= {f"ema.{k}": v for k, v in update.ema.module.state_dict().items()}
    tensors |= optimizer | {"bad_in_a_row": update.bad_in_a_row, "worst_streak": run.worst_streak}
    for name, own in (generator_tensors(device) | run.monitor.meter.tensors()).items():
        for rank, tensor in enumerate(distributed.gather_to_main(own.cpu())):
            prefix = f"rank{rank}." if rank else ""
            tensors[prefix + name] = tensor
    state = {
        **identity(run),
        "config": to_toml(run.cfg),
        "optimizer": optimizer_state,
        "scaler": update.scaler.state_dict(),
        "best_top1": run.best_top1,
        "best_epoch": run.best_epoch,
        "validation_due": run.validation_due,
        "train_seconds": run.clock.total,
        "shared_by": run.shared_by,
        "metrics_offset": run.log.offset() if distributed.is_main() else 0,
        "bad_images": run.monitor.gathered_bad_images(),
        "failed_over": sum(distributed.all_gather_json(run.loader.failed_over)),
    }
    return tensors, state


def take(run: TrainRun, best: bool) -> Save | None:
    """Copy the state of this moment. Returns how to write it, in the first process. A collective."""
    tensors, state = run_state(run)
    model, metadata = run.model_file()
    if not distributed.is_main():
        return None
    tensors, model = snapshot(tensors, model)
    step = run.next_step

    def write() -> None:
        # First, because the checkpoint records the length of the log.
        run.log.sync()
        files = tensors, state, lambda path: write_safetensors(path, model, metadata)
        run.checkpoints.save(step, *files, best, prune=False)

    def prune(protected: int | None) -> None:
        run.checkpoints.prune(step, protected)

    return Save(write, prune)


def write(saves: Sequence[Save], writer: Writer, protected: int | None) -> None:
    """Write checkpoints in the thread of `writer`, after those before, while training continues.

    protected: a step that no run deletes. Old checkpoints are deleted after the last one is
    written, so that a kill leaves a step of which every run has a checkpoint.
    """

    def work() -> None:
        for one in saves:
            one.write()
        for one in saves:
            one.prune(protected)

    writer.submit(work)


def load_for_all(
    folder: CheckpointFolder, path: str, log: Callable[[str], None]
) -> Checkpoint | None:
    """Load a checkpoint in the first process and send it to the others, which need not see the
    folder.
    """
    found: list[Checkpoint | None] = [None]

    def load() -> Any:
        found[0] = folder.load(path, log)
        return None if found[0] is None else [str(found[0].path), found[0].state]

    described = distributed.on_main(load)
    if described is None:
        return None
    where, state = described
    tensors = distributed.broadcast_tensors(found[0].tensors if found[0] else None)
    return Checkpoint(Path(where), tensors, state)


def restore(run: TrainRun, found: Checkpoint, allow_config_change: bool) -> None:
    """Restore the state of a checkpoint into a run.

    Raises UsageError, naming every difference, if settings, data or models changed; DataError for a
    checkpoint that is undamaged but not of such a run.
    """
    try:
        world = found.state["world"]
        if type(world) is not int:
            raise ValueError("the number of its processes is missing")
        if world != 1 and f"rank{world - 1}.generator.torch" not in found.tensors:
            raise ValueError("the states of some of its processes are missing")
        _restore(run, found, allow_config_change)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = " ".join(str(error).split())[:160]
        raise DataError(
            f"checkpoint {found.path}: not the state of such a run ({type(error).__name__}: "
            f"{why}); name another"
        ) from None


def _restore(run: TrainRun, found: Checkpoint, allow_config_change: bool) -> None:
    changed, lines = changes(run, found), notes(run, found)
    if changed and not allow_config_change:
        what = "; ".join(changed)
        raise UsageError(
            f"--resume: not the settings of {found.path}: {what}; restore them, or add "
            "--allow-config-change"
        )
    if changed:
        lines.insert(
            0,
            f"resuming with other settings than those of {found.path} (--allow-config-change): "
            f"{'; '.join(changed)}",
        )

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}

    update, device, state = run.update, run.parts.device, found.state
    try:
        run.parts.student.load_state_dict(under("student."))
    except RuntimeError as error:
        what = f"{found.path} holds another student ({' '.join(str(error).split())[:200]})"
        raise UsageError(f"--resume: {what}; give the one that the run began with") from None
    if update.ema is not None:
        # An EMA that the run did not have before starts from the student.
        update.ema.module.load_state_dict(under("ema.") or under("student."))
    lines += _restore_optimizer(run, found)
    # A scaler that the run did not have before keeps its initial state.
    if update.scaler.is_enabled() == bool(state["scaler"]):
        update.scaler.load_state_dict(state["scaler"])
    update.bad_in_a_row.copy_(found.tensors["bad_in_a_row"])
    run.worst_streak.copy_(found.tensors["worst_streak"])

    processes = [under(f"rank{rank}.") if rank else found.tensors for rank in range(state["world"])]
    if state["world"] == distributed.world():
        processes = [processes[distributed.rank()]]
        restore_generators(processes[0], device)
    else:
        seed_generators(run.cfg.seed, state["step"])
    run.monitor.meter.restore(processes, device)
    run.next_step = state["step"]
    run.best_top1 = state["best_top1"]
    # Absent in checkpoints of earlier versions.
    run.best_epoch = float(state.get("best_epoch", 0.0))
    run.validation_due = state["validation_due"]
    run.clock.total = state["train_seconds"]
    run.shared_by = int(state.get("shared_by", 1))
    run.loader.replaced[:] = state["bad_images"]
    run.monitor.bad_images = set(state["bad_images"])
    run.loader.failed_over = state["failed_over"] if distributed.is_main() else 0
    run.notes += lines


def _restore_optimizer(run: TrainRun, found: Checkpoint) -> list[str]:
    """Restore the optimizer, keeping changed settings; another optimizer starts fresh. Returns
    lines for the log.
    """
    before, now = config_of(found).optim, run.cfg.optim
    if before.opt != now.opt:
        return [f"{now.opt} starts with a fresh state: the run began with {before.opt}"]
    if bool(before.layer_decay) != bool(now.layer_decay):
        began = "with" if before.layer_decay else "without"
        return [f"{now.opt} starts with a fresh state: the run began {began} --layer-decay"]
    old, new = _group_settings(before), _group_settings(now)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    restore_optimizer(run.update.optimizer, found.tensors, found.state["optimizer"], changed)
    return []


def _group_settings(optim: OptimConfig) -> dict[str, Any]:
    return {
        "weight_decay": optim.weight_decay,
        "momentum": optim.momentum,
        "betas": optim.opt_betas,
        "eps": optim.opt_eps,
        "lr_scale": optim.layer_decay,
        **optim.opt_kwargs,
    }
