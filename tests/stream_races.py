"""Race checker for streams: operations on a CPU, ordered as the streams and events of CUDA are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

STAND_INS = ("/graph_tape.py", "/stream_races.py")


def leaves(values: Any) -> list[Any]:
    """Return what an operation's arguments or results hold: lists, tuples and dicts unpacked."""
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, (list, tuple)):
        return [values]
    return [leaf for value in values for leaf in leaves(value)]


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(values) if isinstance(leaf, Tensor)]


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an operation writes to, by its schema."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            is_given = position < len(args)
            written += tensors_of(args[position] if is_given else kwargs.get(argument.name))
    return written


def project_line() -> str:
    """Return the line of the project, or of its tests, that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        is_ours = "/dad_fast/" in name or "/tests/" in name
        if is_ours and not name.endswith(STAND_INS):
            return f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Stream:
    """Queue of the device, as a vector clock: how far each queue is when this one continues."""

    device_index = 0

    def __init__(self, device: Any = None) -> None:
        self.time = 0
        self.seen: dict[Stream, int] = {}

    def record_event(self) -> dict[Stream, int]:
        return {**self.seen, self: self.time}

    def wait_event(self, event: dict[Stream, int]) -> None:
        self._join(event)

    def wait_stream(self, other: Stream) -> None:
        self._join(other.record_event())

    def _join(self, event: dict[Stream, int]) -> None:
        for stream, time in event.items():
            self.seen[stream] = max(self.seen.get(stream, 0), time)


class Use(NamedTuple):
    stream: Stream
    time: int
    what: str

    def is_seen_by(self, stream: Stream) -> bool:
        return self.stream is stream or stream.seen.get(self.stream, 0) >= self.time


class Memory:
    """Last uses of a storage, and the stream on which it was allocated (None: before `watch`)."""

    def __init__(self, storage: torch.UntypedStorage, stream: Stream | None) -> None:
        self.alive = StorageWeakRef(storage)
        self.stream = stream
        self.write: Use | None = None
        self.reads: dict[Stream, Use] = {}

    def uses(self) -> list[Use]:
        return [*([self.write] if self.write else []), *self.reads.values()]


class Watch(TorchDispatchMode):
    """Collects races.

    A race is an operation that does not wait for another stream's write of the memory that it uses,
    or for its read of the memory that it writes; or an allocation that may get memory, freed on its
    stream, which another stream still uses.
    """

    def __init__(self, current_stream: Callable[[], Stream]) -> None:
        super().__init__()
        self.current_stream = current_stream
        self.quiet = False
        self.memory: dict[int, Memory] = {}  # by address
        self.visited: dict[int, Memory] = {}  # used by another stream than the allocating one
        self.races: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.quiet:
            return out
        inputs = tensors_of((args, kwargs))
        addresses = {t.untyped_storage().data_ptr() for t in inputs}
        new = [t for t in tensors_of(out) if t.untyped_storage().data_ptr() not in addresses]
        groups = inputs, written_by(func, args, kwargs), new
        self.use(func.name(), *([t.untyped_storage() for t in group] for group in groups))
        return out

    def clear(self) -> None:
        """Forget all uses: the host has waited for the device."""
        self.memory.clear()
        self.visited.clear()

    def use(
        self,
        what: str,
        read: list[torch.UntypedStorage],
        written: list[torch.UntypedStorage],
        new: list[torch.UntypedStorage] | None = None,
    ) -> None:
        """Record an operation on the current stream."""
        new = new or []
        stream = self.current_stream()
        stream.time += 1
        now = Use(stream, stream.time, what)
        if new:
            self._allocate(stream, what)
        for storage in new:
            self.memory[storage.data_ptr()] = Memory(storage, stream)
        writes = {storage.data_ptr() for storage in (*written, *new)}
        for address, storage in {s.data_ptr(): s for s in (*read, *written, *new)}.items():
            memory = self.memory.get(address)
            if memory is None or memory.alive.expired():
                memory = self.memory[address] = Memory(storage, None)
            if memory.stream not in (stream, None):
                self.visited[address] = memory
            is_write = address in writes
            others = memory.uses() if is_write else memory.uses()[: memory.write is not None]
            for other in others:
                if not other.is_seen_by(stream):
                    self.races.append(f"{what} at {project_line()} does not wait for {other.what}")
            if is_write:
                memory.write = now
                memory.reads = {}
            else:
                memory.reads[stream] = now

    def _allocate(self, stream: Stream, what: str) -> None:
        for address, memory in list(self.visited.items()):
            if memory.stream is not stream or not memory.alive.expired():
                continue
            del self.visited[address]
            for use in memory.uses():
                if not use.is_seen_by(stream):
                    where = project_line()
                    self.races.append(f"{what} at {where} may get memory that {use.what} uses")
