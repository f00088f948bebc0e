"""Several processes that train one student: who this one is, and what they tell each other.

`dad-fast train --nproc N` (launch.py) and torchrun start the processes and say in the environment who each one is; without them there is
one, and everything here costs nothing. Tensors on GPUs go through NCCL. Whatever the hosts agree on (a stop, a failure, numbers for the
log) goes through gloo between the hosts and never waits for a GPU; it is plain bytes and JSON, never a pickle.

To count every image of a test set once, on any number of processes: take `samples[rank()::world()]`, sum what is counted, and
`all_reduce_sums` it; `gather` brings together what is kept per image. Every process must make the same calls in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dad_fast import errors
from dad_fast.config.schema import Config
from dad_fast.distributed.launch import STORE, started_here
from dad_fast.distributed.peers import say_stopped, who_is_gone
from dad_fast.errors import DadFastError, EnvironmentProblem, Interrupted, Preempted, UsageError

T = TypeVar("T")
JOIN = 600.0  # seconds until all processes have met
LONG = 3600.0  # seconds to wait for another process where one may work for minutes: the first step, the end of a run

_joined = False


def rank() -> int:
    """This process's number, 0 … world() - 1."""
    return _number("RANK", 0) if world() > 1 else 0


def world() -> int:
    """The number of processes."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def local_rank() -> int:
    """This process's number among those of its machine: which GPU is its own."""
    return _number("LOCAL_RANK", 0) if world() > 1 else 0


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or not value.isascii():
        raise EnvironmentProblem(
            f"{name}={value} in the environment is no number; unset RANK and WORLD_SIZE, or let torchrun set them"
        )
    return int(value)


def is_main() -> bool:
    """Whether this process writes the run's folder and speaks to the user."""
    return rank() == 0


def init(cfg: Config) -> None:
    """Join the other processes; nothing to do for one. A second call does nothing. `cfg.device` decides between NCCL and gloo alone.

    Raises UsageError for a device that all processes would share, EnvironmentProblem where GPUs are too few or the others do not come.
    """
    global _joined
    if world() == 1 or _joined:
        return
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if cuda:
        if cfg.device.startswith("cuda:"):
            raise UsageError(
                f"--device {cfg.device}: all processes would use this one; --device cuda gives each its own GPU"
            )
        gpus = torch.cuda.device_count()
        if local_rank() >= gpus and (
            gpus > 1 or started_here()
        ):  # else a scheduler may show each process its own GPU alone
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
            raise EnvironmentProblem(
                f"{here} processes on a machine with {gpus} GPUs; start one a GPU (--nproc auto)"
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
        where = (
            f" at {os.environ['MASTER_ADDR']}" if not path and "MASTER_ADDR" in os.environ else ""
        )
        raise EnvironmentProblem(
            f"process {rank()} of {world()} cannot join the others{where}: {_line(error)}"
        ) from None
    _joined = True
    _store().set_timeout(
        timedelta(seconds=LONG)
    )  # NCCL's connections meet there when they are first used
    set_timeout(LONG)


def close() -> None:
    """Leave the others; nothing to do where there are none."""
    global _joined
    if _joined:
        _joined = False
        dist.destroy_process_group()


@contextmanager
def joined(cfg: Config) -> Iterator[None]:
    """`init`, and `close` at the end. After a failure the group is left to the end of the process: closing it might wait for the others.

    A process that leaves because it was asked to stop says so, lest the others take it for lost.
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
    assert _joined or world() == 1, "processes speak to each other after init() only"
    return not _joined


def set_timeout(seconds: float) -> None:
    """From now on another process that does not answer for so long is given up."""
    if not _alone():
        set_timeout = (
            getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        )  # the first is torch 2.15's
        set_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def all_reduce_sums(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place and returned: bit for bit the same on each. On a GPU the host does not wait."""
    if not _alone():
        with _others_needed():
            dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every process is here. Says nothing about what their GPUs still do."""
    all_reduce_sums(torch.zeros(()))


def all_gather_json(value: Any) -> list[Any]:
    """What each process gave, in their order, on all of them. `value` is anything that JSON holds, floats exactly."""
    if _alone():
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = torch.zeros(world(), dtype=torch.int64)
    sizes[rank()] = len(mine)
    all_reduce_sums(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in range(world())]
    with _others_needed():
        dist.all_gather(found, padded)
    return [
        json.loads(bytes(one[:size].tolist()))
        for one, size in zip(found, sizes.tolist(), strict=True)
    ]


def broadcast(value: Any) -> Any:
    """Process 0's value, on all of them; anything that JSON holds."""
    if _alone():
        return value
    data = bytearray(json.dumps(value).encode()) if is_main() else bytearray(1)
    size = torch.tensor([len(data)])
    with _others_needed():
        dist.broadcast(size, 0)
        buffer = (
            torch.frombuffer(data, dtype=torch.uint8)
            if is_main()
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(buffer, 0)
    return json.loads(bytes(buffer.tolist()))


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Process 0's values into `tensors`, which all processes have in the same shapes."""
    if not _alone():
        with _others_needed(), torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)


def broadcast_tensors(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Process 0's named tensors, on all of them, in host memory."""
    if _alone():
        return tensors or {}
    described = broadcast(
        {
            k: [str(v.dtype).removeprefix("torch."), list(v.shape)]
            for k, v in (tensors or {}).items()
        }
    )
    empty = {
        name: torch.empty(shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape) in described.items()
    }
    found = tensors or empty
    broadcast_([found[name] for name in described])
    return found


def gather_to_main(tensor: Tensor) -> list[Tensor]:
    """Each process's tensor, of the same shape in all of them and in host memory: a list in process 0, an empty one in the others."""
    if _alone():
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(world())] if is_main() else []
    with _others_needed():
        dist.gather(tensor, found or None)
    return found


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns in process 0 (anything that JSON holds), on all of them. What it raises there, all of them raise."""
    if _alone():
        return function()
    answer: dict[str, Any] = {}
    error: Exception | None = None
    if is_main():
        try:
            answer = {"value": function()}
        except Exception as raised:
            error, answer = raised, {"error": [type(raised).__name__, str(raised)]}
    answer = broadcast(answer)
    if error is not None:
        raise error
    if "error" in answer:
        name, text = answer["error"]
        raise getattr(errors, name, DadFastError)(text)
    return answer["value"]


@contextmanager
def main_first() -> Iterator[None]:
    """The block in the first process of every machine, then in the others: what the first one leaves in a cache they find there."""
    if local_rank():
        barrier()
    yield
    if local_rank() == 0:
        barrier()


class Vote:
    """Whether any process was asked to stop, agreed by all at the same step without waiting for one another.

    At each step boundary a process gives what it was asked for and gets what all of them had been asked for by the boundary before: the
    hosts exchange it meanwhile. So all of them stop one step after the first has heard of it.
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
        """The last exchange's outcome; afterwards none is under way."""
        if self._work is None:
            return None
        with _others_needed():
            self._work.wait()
        self._work = None
        return self._ERRORS[int(self._asked)]


@contextmanager
def _others_needed() -> Iterator[None]:
    """A process that died or hangs shows as a failure to talk to it: find out which one it is."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's; DistBackendError is one
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise who_is_gone(_store(), rank(), world(), _line(error)) from error


def _store() -> Any:
    """Where the processes met."""
    return dist.distributed_c10d._get_default_store()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split("]", 1)[-1].split())[:160]
