"""What a checkpoint holds of a run, and how a run takes it up again: nothing else is carried over, and nothing of this is left out.

Of several processes the first one saves and loads for all. Weights, optimizer, EMA and running statistics are the same in all of them; of
the generators each has its own. Where the number of processes is another one than before, the global order of the samples goes on as
it was, and processes that were not there before draw their dropout from new seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from dad_fast.config import to_toml
from dad_fast.distributed import process_group as distributed
from dad_fast.errors import DataError, UsageError
from dad_fast.keyed_random import sample_seeds
from dad_fast.models.weights.files import write_safetensors


def seed_generators(seed: int, step: int = 0) -> None:
    """Python's, NumPy's and torch's, for dropout and its kind: in each process another one, in the first `seed` itself."""
    rank = distributed.rank()
    own = seed if rank == 0 and step == 0 else int(sample_seeds(seed, step, np.array([rank]))[0])
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def run_state(run: TrainRun) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, which still are the run's own, and JSON. All processes call it; the first one's result is for all."""
    update, device = run.update, run.parts.device
    optimizer, optimizer_state = flatten_optimizer(update.optimizer)
    tensors: dict[str, Tensor] = {
        f"student.{k}": v for k, v in run.parts.student.state_dict().items()
    }
    if update.ema is not None:
        tensors |= {f"ema.{k}": v for k, v in update.ema.module.state_dict().items()}
    tensors |= optimizer | {"bad_in_a_row": update.bad_in_a_row, "worst_streak": run.worst_streak}
    for name, own in (generator_tensors(device) | run.meter.tensors()).items():
        tensors |= {
            (f"rank{rank}." if rank else "") + name: state
            for rank, state in enumerate(distributed.gather_to_main(own.cpu()))
        }
    state = {
        **identity(run),
        "config": to_toml(run.cfg),
        "optimizer": optimizer_state,
        "scaler": update.scaler.state_dict(),
        "best_top1": run.best_top1,
        "validation_due": run.validation_due,
        "train_seconds": run.clock.total,
        "metrics_offset": run.log.offset() if distributed.is_main() else 0,
        "bad_images": run.gathered_bad_images(),
        "failed_over": sum(distributed.all_gather_json(run.loader.failed_over)),
    }
    return tensors, state


def save(run: TrainRun, best: bool) -> None:
    """A checkpoint of this moment, written while training goes on; what came before it is on the disk by then."""
    tensors, state = run_state(run)
    model, metadata = run.model_file()
    if not distributed.is_main():
        return
    run.advice.on_write(run.writer.wait(), run.log.say)
    tensors, model = snapshot(tensors, model)
    step = run.next_step

    def write() -> None:
        run.log.sync()  # first: the checkpoint says how long it is
        run.checkpoints.save(
            step, tensors, state, lambda path: write_safetensors(path, model, metadata), best
        )

    run.writer.submit(write)


def load_for_all(
    folder: CheckpointFolder, path: str, say: Callable[[str], None]
) -> Checkpoint | None:
    """`CheckpointFolder.load` by the first process, for all of them: the others need not see the folder."""
    found: list[Checkpoint | None] = [None]

    def load() -> Any:
        found[0] = folder.load(path, say)
        return None if found[0] is None else [str(found[0].path), found[0].state]

    described = distributed.on_main(load)
    if described is None:
        return None
    return Checkpoint(
        Path(described[0]),
        distributed.broadcast_tensors(found[0].tensors if found[0] else None),
        described[1],
    )


def restore(run: TrainRun, found: Checkpoint, allow_config_change: bool) -> None:
    """Raises UsageError where the run would not go on with what it began with, naming every difference; DataError for a checkpoint that
    is as it was written, but not by such a run."""
    try:
        world = found.state["world"]
        if type(world) is not int or not (
            world == 1 or f"rank{world - 1}.generator.torch" in found.tensors
        ):
            raise ValueError("no states of all its processes")
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
            f"checkpoint {found.path}: not the state of such a run ({type(error).__name__}: {why}); name another"
        ) from None


def _restore(run: TrainRun, found: Checkpoint, allow_config_change: bool) -> None:
    changed, said = changes(run, found), notes(run, found)
    if changed and not allow_config_change:
        what = "; ".join(changed)
        raise UsageError(
            f"--resume: not the settings of {found.path}: {what}; restore them, or add --allow-config-change"
        )
    if changed:
        said.insert(
            0,
            f"going on with other settings than those of {found.path} (--allow-config-change): {'; '.join(changed)}",
        )

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}

    update, device, state = run.update, run.parts.device, found.state
    try:
        run.parts.student.load_state_dict(under("student."))
    except RuntimeError as error:
        what = f"{found.path} holds another student ({' '.join(str(error).split())[:200]})"
        raise UsageError(f"--resume: {what}; give the one that the run began with") from None
    if update.ema is not None:  # an average that begins now begins with the weights as they are
        update.ema.module.load_state_dict(under("ema.") or under("student."))
    said += _restore_optimizer(run, found)
    update.scaler.load_state_dict(
        state["scaler"]
        if update.scaler.is_enabled() == bool(state["scaler"])
        else update.scaler.state_dict()
    )
    for name, own in (("bad_in_a_row", update.bad_in_a_row), ("worst_streak", run.worst_streak)):
        own.copy_(found.tensors[name])
    processes = [under(f"rank{rank}.") if rank else found.tensors for rank in range(state["world"])]
    if state["world"] == distributed.world():
        processes = [processes[distributed.rank()]]
        restore_generators(processes[0], device)
    else:
        seed_generators(run.cfg.seed, state["step"])
    run.meter.restore(processes, device)
    run.next_step, run.best_top1, run.validation_due = (
        state["step"],
        state["best_top1"],
        state["validation_due"],
    )
    run.clock.total = state["train_seconds"]
    run.loader.replaced[:], run.bad_images = state["bad_images"], set(state["bad_images"])
    run.loader.failed_over = state["failed_over"] if distributed.is_main() else 0
    run.notes += said


def _restore_optimizer(run: TrainRun, found: Checkpoint) -> list[str]:
    """Returns what there is to say. Settings that were changed are the new ones; another optimizer begins with no past."""
    before, now = config_of(found).optim, run.cfg.optim
    if before.opt != now.opt:
        return [f"{now.opt} begins without a past: the run began with {before.opt}"]
    names = {"weight_decay", "momentum", *before.opt_kwargs, *now.opt_kwargs}
    old, new = (
        {"weight_decay": one.weight_decay, "momentum": one.momentum, **one.opt_kwargs}
        for one in (before, now)
    )
    restore_optimizer(
        run.update.optimizer,
        found.tensors,
        found.state["optimizer"],
        {n for n in names if old.get(n) != new.get(n)},
    )
    return []
