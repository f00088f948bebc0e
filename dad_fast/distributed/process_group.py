"""Process group: rank, world size and collectives.

`dad-fast train --nproc N` (launch.py) and torchrun start the processes and set their ranks in the
environment. A single process needs no group, and every collective returns at once. Tensors on GPUs
go through NCCL. Values of the hosts (stop requests, failures, numbers for the log) go through gloo
and never wait for a GPU. They are pickled: the processes of a run trust each other.

To count every image of a test set once: take `samples[rank()::world()]`, sum the counts, and pass
them to `all_reduce_sums`. Every process must make the same calls in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dad_fast import errors
from dad_fast.config.schema import Config
from dad_fast.distributed.launch import STORE, launcher, started_here
from dad_fast.distributed.peers import say_stopped, who_is_gone
from dad_fast.errors import DadFastError, EnvironmentProblem, Interrupted, Preempted, UsageError
from dad_fast.locks import lock_folder

T = TypeVar("T")
# Seconds to wait until all processes have joined.
JOIN = 600.0
# Seconds to wait for another process where one may work for minutes: the first step, the end of a
# run.
LONG = 3600.0

_joined = False


def rank() -> int:
    """Return the number of this process, 0 … world() - 1."""
    return _number("RANK", 0) if world() > 1 else 0


def world() -> int:
    """Return the number of processes."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Return the number of this process on its machine, which is the number of its GPU."""
    return _number("LOCAL_RANK", 0) if world() > 1 else 0


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or not value.isascii():
        raise EnvironmentProblem(
            f"{name}={value} in the environment is no number; "
            "unset RANK and WORLD_SIZE, or let torchrun set them"
        )
    return int(value)


def is_main() -> bool:
    """Return whether this process writes the run's folder and prints to the user."""
    return rank() == 0


def init(cfg: Config) -> None:
    """Join the other processes. Does nothing for a single process, or when called again.

    `cfg.device` selects NCCL and gloo, or gloo alone. Raises UsageError for a device that all
    processes would share, EnvironmentProblem for too few GPUs or when the others do not join.
    """
    global _joined
    if world() == 1 or _joined:
        return
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if cuda:
        if cfg.device.startswith("cuda:"):
            raise UsageError(
                f"--device {cfg.device}: all processes would use this one; "
                "--device cuda gives each its own GPU"
            )
        gpus = torch.cuda.device_count()
        # With a single visible GPU, a scheduler may show each process only its own.
        if local_rank() >= gpus and (gpus > 1 or started_here()):
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
            raise EnvironmentProblem(
                f"{here} processes on a machine with {gpus} GPUs; start one per GPU (--nproc auto)"
            )
        torch.cuda.set_device(local_rank() % gpus)
    path = os.environ.get(STORE)
    try:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.FileStore(path, world()) if path else None,
            rank=rank() if path else -1,
            world_size=world() if path else -1,
            timeout=timedelta(seconds=JOIN),
        )
    except (RuntimeError, ValueError) as error:
        address = os.environ.get("MASTER_ADDR", "")
        where = f" at {address}" if address and not path else ""
        raise EnvironmentProblem(
            f"process {rank()} of {world()} cannot join the others{where}: {_line(error)}"
        ) from None
    _joined = True
    # NCCL connects through the store at its first use.
    _store().set_timeout(timedelta(seconds=LONG))
    set_timeout(LONG)


def close() -> None:
    """Leave the group, if this process is in one."""
    global _joined
    if _joined:
        _joined = False
        dist.destroy_process_group()


@contextmanager
def joined(cfg: Config) -> Iterator[None]:
    """Call `init`, and `close` at the end of the block.

    After a failure the group stays open until the process ends, since closing might wait for the
    others. A process that was asked to stop tells the others, which would otherwise report it lost.
    """
    init(cfg)
    try:
        yield
    except (Preempted, Interrupted) as stop:
        if _joined:
            say_stopped(_store(), rank(), stop)
        raise
    close()


def _alone() -> bool:
    assert _joined or world() == 1, "collectives need init()"
    return not _joined


def set_timeout(seconds: float) -> None:
    """Set the time after which a process that does not answer counts as lost."""
    if not _alone():
        # torch 2.15 has the public function.
        set_group_timeout = (
            getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        )
        set_group_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def all_reduce_sums(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place, and return the tensor: bit-identical on each.

    On a GPU the host does not wait.
    """
    if not _alone():
        with _others_needed():
            dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every process has called this. Does not wait for their GPUs."""
    all_reduce_sums(torch.zeros(()))


def all_gather_json(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, on each of them."""
    if _alone():
        return [value]
    found: list[Any] = [None] * world()
    with _others_needed():
        dist.all_gather_object(found, value)
    return found


def broadcast(value: Any) -> Any:
    """Return process 0's value on all processes."""
    if _alone():
        return value
    found = [value]
    with _others_needed():
        dist.broadcast_object_list(found, 0)
    return found[0]


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Copy process 0's values into `tensors`, of the same shapes on all processes."""
    if not _alone():
        with _others_needed(), torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)


def broadcast_tensors(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return process 0's named tensors on all processes, in host memory."""
    if _alone():
        return tensors or {}
    described = broadcast(
        {name: (tensor.dtype, tensor.shape) for name, tensor in (tensors or {}).items()}
    )
    found = tensors or {
        name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in described.items()
    }
    broadcast_([found[name] for name in described])
    return found


def gather_to_main(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes in process 0, an empty list in the others.

    tensor: in host memory, of the same shape on all processes.
    """
    if _alone():
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(world())] if is_main() else []
    with _others_needed():
        dist.gather(tensor, found or None)
    return found


def on_main(function: Callable[[], T]) -> T:
    """Call `function` in process 0 and return its result, or raise its error, on all processes.

    The result must be picklable; an error arrives as one of `dad_fast.errors` with its text.
    """
    if _alone():
        return function()
    answer: dict[str, Any] = {}
    error: Exception | None = None
    if is_main():
        try:
            answer = {"value": function()}
        except Exception as raised:
            error = raised
            answer = {"error": (type(raised).__name__, str(raised))}
    answer = broadcast(answer)
    if error is not None:
        raise error
    if "error" in answer:
        name, text = answer["error"]
        raise getattr(errors, name, DadFastError)(text)
    return answer["value"]


@contextmanager
def main_locks(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` in process 0. Its error is raised on all processes."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(lock_folder(folder, owner=launcher()))

        on_main(lock)
        yield


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the first process of every machine, then in the others.

    The others find the caches that the first one has filled.
    """
    if local_rank():
        barrier()
    yield
    if local_rank() == 0:
        barrier()


class Vote:
    """Agreement of all processes to stop at the same step, without waiting for each other.

    At each step boundary a process passes its own stop request and receives the strongest request
    of all processes at the boundary before; the hosts exchange them during the step. All processes
    stop one step after the first request.
    """

    _ERRORS: tuple[type[DadFastError] | None, ...] = (None, Preempted, Interrupted)

    def __init__(self) -> None:
        self._work: dist.Work | None = None
        self._asked = torch.zeros(1, dtype=torch.int64)

    def __call__(self, mine: type[DadFastError] | None) -> type[DadFastError] | None:
        if _alone():
            return mine
        agreed = self.settle()
        if agreed is None:
            self._asked.fill_(self._ERRORS.index(mine))
            with _others_needed():
                self._work = dist.all_reduce(self._asked, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def settle(self) -> type[DadFastError] | None:
        """Wait for the exchange in progress and return its outcome."""
        if self._work is None:
            return None
        with _others_needed():
            self._work.wait()
        self._work = None
        return self._ERRORS[int(self._asked)]


@contextmanager
def _others_needed() -> Iterator[None]:
    """Turn a failed collective into an error that names the process that died or hangs."""
    try:
        yield
    except RuntimeError as error:
        # Errors of gloo and NCCL, DistBackendError included.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise who_is_gone(_store(), rank(), world(), _line(error)) from error


def _store() -> Any:
    """Return the store of the group."""
    return dist.distributed_c10d._get_default_store()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split("]", 1)[-1].split())[:160]
