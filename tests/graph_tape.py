"""CUDA graphs on a CPU: capture and replay of the training step without a GPU.

    with tape():
        step = make_step(cfg, ...)  # cuda_graphs="on" captures, though the device is a CPU

Inside, engine/cuda_graph.py and engine/prefetch.py get a stand-in for `torch.cuda`. A capture is a
TorchDispatchMode that notes every operation with the addresses of its tensors. A replay runs these
operations on the same addresses, and no Python of the step. As on CUDA:

- A capture changes nothing: what it wrote to tensors from outside is undone, random numbers too.
- Results lie in a pool. A block returns to the pool when its last reference is gone; it is poisoned
  with 0xFF (NaN, or -1) at this point of every replay, and later operations reuse it.
- A tensor from outside is an address. A replay raises Dangling if nobody keeps the tensor.
- Reads on the host (`item`, a branch, `nonzero`, `cpu`, a mask as index) break the capture off.
- Random operations draw from the default generator at every replay; others are refused.
- Streams and events order nothing on a CPU; `watch` (tests/stream_races.py) checks with vector clocks
  that operations wait for each other where they share memory.

Not emulated: kernels that torch does not dispatch (Triton, compiled code), custom operations (they
are called again at a replay, Python included), devices of tensors (test_no_host_sync.py), CUDA's
rounding.

Private names of torch used here: torch.utils._python_dispatch, StorageWeakRef,
UntypedStorage._new_with_weak_ptr, OpOverload._schema. engine/cuda_graph.py adds
torch._C._cuda_endAllocateToPool and _cuda_releasePool, which are replaced here.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.engine import cuda_graph, prefetch
from dad_fast.engine.cuda_graph import StepGraphs
from dad_fast.kernels import CodebookSearch
from tests.stream_races import Stream, Watch, leaves, project_line, tensors_of

ALIGN = 512  # bytes, as CUDA's allocator
SEGMENT = 1 << 22
POISON = 0xFF


class Dangling(RuntimeError):
    """Raised by a replay that would use memory from outside which nobody keeps any more."""


class NotPermitted(RuntimeError):
    """Raised for what CUDA forbids while a stream is captured."""


def memory_at(address: int, num_bytes: int) -> np.ndarray:
    """Return the bytes at an address. The array keeps nothing alive, like a kernel's argument."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def view_of(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """Return a tensor with the dtype, sizes and strides of `like` in another storage."""
    where = like.storage_offset(), like.size(), like.stride()
    return torch.empty(0, dtype=like.dtype).set_(storage, *where)


def map_tensors(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {key: map_tensors(function, value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)([map_tensors(function, value) for value in values])
    return values


class Pool:
    """Memory for the results of captured operations."""

    def __init__(self) -> None:
        self._segments: list[np.ndarray] = []
        self._addresses: list[range] = []  # of each segment
        self._unused = range(0)  # addresses of the last segment that were never handed out
        self._free: dict[int, list[int]] = defaultdict(list)  # size -> addresses
        self._freed: list[tuple[int, int]] = []  # by finalizers: address, size

    def take(self, num_bytes: int) -> torch.UntypedStorage:
        """Return a storage; its block returns to the pool when the storage is freed."""
        size = -(-num_bytes // ALIGN) * ALIGN
        if self._free[size]:
            address = self._free[size].pop()
        else:
            if len(self._unused) < size:
                self._grow(max(size, SEGMENT))
            address = self._unused.start
            self._unused = self._unused[size:]
        block = memory_at(address, num_bytes)
        weakref.finalize(block, self._freed.append, (address, size)).atexit = False
        return torch.from_numpy(block).untyped_storage()

    def _grow(self, num_bytes: int) -> None:
        segment = np.full(num_bytes + ALIGN, POISON, np.uint8)
        start = -(-segment.ctypes.data // ALIGN) * ALIGN
        self._segments.append(segment)
        self._unused = range(start, start + num_bytes)
        self._addresses.append(self._unused)

    def recycle(self) -> list[tuple[int, int]]:
        """Make freed blocks available again. Returns them: address, size."""
        blocks = []
        while self._freed:
            blocks.append(self._freed.pop())
        for address, size in blocks:
            self._free[size].append(address)
        return blocks

    def __contains__(self, address: int) -> bool:
        return any(address in addresses for addresses in self._addresses)

    def poison(self) -> None:
        """Overwrite everything: a capture has run nothing."""
        for segment in self._segments:
            segment.fill(POISON)


class Outside(NamedTuple):
    """Memory that the graph did not allocate."""

    alive: StorageWeakRef
    address: int
    num_bytes: int
    before: bytes  # its content before the capture
    first_use: str
    written: bool = False


class Graph:
    """Stand-in for torch.cuda.CUDAGraph."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.pool: Pool | None = None
        self.operations: list[Callable[[], object]] = []
        self.outside: dict[int, Outside] = {}
        self.constants: list[Tensor] = []  # Python numbers, which a kernel gets by value

    def replay(self) -> None:
        assert self.pool is not None
        used = [self._storage(one) for one in self.outside.values()]
        if self.pool not in self.cuda.replayed:
            self.cuda.replayed.append(self.pool)
            self.pool.poison()
        with self.cuda.unwatched(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            for operation in self.operations:
                operation()
        if self.cuda.watch is not None:
            pairs = zip(used, self.outside.values(), strict=True)
            written = [storage for storage, one in pairs if one.written]
            self.cuda.watch.use(f"a replay of {len(self.operations)} operations", used, written)

    @staticmethod
    def _storage(one: Outside) -> torch.UntypedStorage:
        if not one.alive.expired():
            storage = torch.UntypedStorage._new_with_weak_ptr(one.alive.cdata)
            if storage.data_ptr() == one.address:
                return storage
        raise Dangling(f"{one.num_bytes} bytes, first used at {one.first_use}, are gone")


class Tape(TorchDispatchMode):
    """Records one capture."""

    def __init__(self, graph: Graph, pool: Pool) -> None:
        super().__init__()
        self.graph = graph
        self.pool = pool
        self.broken = False
        self.in_operation = False  # an operation on the CPU may look at its tensors
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def refuse(self, what: str) -> None:
        self.broken = True
        problem = "CUDA error: operation not permitted when stream is capturing"
        raise NotPermitted(f"{problem} ({what} at {project_line()})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if self.broken:
            raise NotPermitted("CUDA error: operation failed due to a previous error")
        self._check(func, name, args, kwargs)
        record = self.graph.operations.append
        for address, size in self.pool.recycle():
            poison = partial(ctypes.memset, address, POISON, size)
            poison()
            record(poison)

        inputs = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs))}
        by_address = map_tensors(self._by_address, (args, kwargs))
        self.in_operation = True
        out = func(*args, **kwargs)
        self.in_operation = False
        if name == "aten::lift_fresh":
            self.graph.constants.append(out)
            return out

        results = tensors_of(out)
        places: dict[int, torch.UntypedStorage] = {}  # address of a result -> its place in the pool
        copies = []  # position among the results, address in the pool, bytes
        for position, result in enumerate(results):
            storage = result.untyped_storage()
            address = storage.data_ptr()
            if not storage.nbytes() or address in inputs or address in places:
                continue
            place = self.pool.take(storage.nbytes())
            ctypes.memmove(place.data_ptr(), address, storage.nbytes())
            places[address] = place
            copies.append((position, place.data_ptr(), storage.nbytes()))

        if places and "empty" in name:
            for _, address, num_bytes in copies:
                poison = partial(ctypes.memset, address, POISON, num_bytes)
                poison()
                record(poison)
        elif places or func._schema.is_mutable:
            record(partial(_run, func, *by_address, copies))

        def placed(value: Tensor) -> Tensor:
            place = places.get(value.untyped_storage().data_ptr())
            return value if place is None else view_of(place, value)

        return map_tensors(placed, out) if places else out

    def _check(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        if name.startswith("aten::index"):
            masks = [t for t in tensors_of(args[1:2]) if t.dtype in (torch.bool, torch.uint8)]
            if masks:
                self.refuse(f"{name} by a mask")
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.refuse(name)
        if name == "aten::lift_fresh" and args[0].dim():
            self.refuse("a tensor from the host")
        if any(isinstance(leaf, torch.Generator) for leaf in leaves((args, kwargs))):
            self.refuse(f"{name} with a generator that the graph does not know")

    def _by_address(self, value: Tensor) -> Tensor:
        """Return a tensor as a kernel gets it, by its address."""
        storage = value.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if not num_bytes:
            return value.detach()
        if address not in self.pool and address not in self.graph.outside:
            before = ctypes.string_at(address, num_bytes)
            alive = StorageWeakRef(storage)
            outside = Outside(alive, address, num_bytes, before, project_line())
            self.graph.outside[address] = outside
        key = address, num_bytes
        if key not in self._storages:
            self._storages[key] = torch.from_numpy(memory_at(*key)).untyped_storage()
        return view_of(self._storages[key], value)

    def undo(self) -> None:
        """Restore memory from outside."""
        for address, one in self.graph.outside.items():
            if not one.alive.expired():
                written = ctypes.string_at(address, one.num_bytes) != one.before
                ctypes.memmove(address, one.before, one.num_bytes)
                self.graph.outside[address] = one._replace(before=b"", written=written)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """F.one_hot as on CUDA; on a CPU it reads the range of the labels."""
    zeros = labels.new_zeros(*labels.shape, num_classes)
    return zeros.scatter_(-1, labels.unsqueeze(-1), 1)


def _run(func: Any, args: Any, kwargs: Any, copies: list[tuple[int, int, int]]) -> None:
    out = func(*args, **kwargs)
    results = tensors_of(out) if copies else []
    for position, address, num_bytes in copies:
        storage = results[position].untyped_storage()
        ctypes.memmove(address, storage.data_ptr(), num_bytes)


class Capture:
    """Stand-in for torch.cuda.graph."""

    def __init__(self, cuda: Cuda, graph: Graph, pool: Pool, **_: Any) -> None:
        self.cuda = cuda
        self.tape = Tape(graph, pool)
        graph.pool = pool

    def __enter__(self) -> None:
        self.random_state = torch.get_rng_state()
        self.cuda.synchronize()
        self.modes = ExitStack()
        self.modes.enter_context(self.cuda.unwatched())
        for name in ("numpy", "tolist", "cpu", "__array__"):
            # On a CPU these are no operations.
            patch = mock.patch.object(Tensor, name, self._refusing(name, getattr(Tensor, name)))
            self.modes.enter_context(patch)
        self.modes.enter_context(mock.patch.object(F, "one_hot", one_hot))
        self.modes.enter_context(self.tape)

    def __exit__(self, *error: Any) -> None:
        self.modes.__exit__(*error)
        torch.set_rng_state(self.random_state)
        self.tape.undo()
        if self.tape.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        if error[0] is None and not self.tape.graph.operations:
            warnings.warn("The CUDA Graph is empty", stacklevel=2)

    def _refusing(self, name: str, original: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if not self.tape.in_operation:
                self.tape.refuse(name)
            return original(*args, **kwargs)

        return refuse


class Cuda:
    """Stand-in for torch.cuda, as far as the engine uses it."""

    def __init__(self) -> None:
        self.Stream = Stream
        self.CUDAGraph = partial(Graph, self)
        self.graph = partial(Capture, self)
        self.graph_pool_handle = Pool
        self.default_generators = [
            SimpleNamespace(get_state=torch.get_rng_state, graphsafe_set_state=torch.set_rng_state)
        ]
        self.streams = [Stream()]  # the last one is current
        self.replayed: list[Pool] = []
        self.watch: Watch | None = None

    def current_stream(self, device: Any = None) -> Stream:
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def synchronize(self, device: Any = None) -> None:
        if self.watch is not None:
            self.watch.clear()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        if self.watch is None:
            yield
            return
        before = self.watch.quiet
        self.watch.quiet = True
        try:
            yield
        finally:
            self.watch.quiet = before


class Torch:
    """Stand-in for torch in the modules that capture and prefetch."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        nothing = lambda *_: None  # noqa: E731
        self._C = SimpleNamespace(_cuda_endAllocateToPool=nothing, _cuda_releasePool=nothing)

    def Generator(self, device: Any) -> Any:  # noqa: N802
        states: list[Tensor] = []
        return SimpleNamespace(set_state=states.append, graphsafe_get_state=lambda: states[-1])

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def tape(watch: bool = False) -> Iterator[Cuda]:
    """Let training steps that are made inside capture and replay on the CPU.

    watch: collect races in `watch.races` of the result.
    """
    cuda = Cuda()
    if_wanted = StepGraphs.if_wanted.__func__

    def on_cpu(cls: Any, wanted: str, device: Any, generate: Any, learn: Any, learners: Any) -> Any:
        for update in [learner.update for learner in learners]:
            # As on CUDA, where learning rates lie on the device.
            if update.optimizer.defaults.get("fused"):
                update.rates = [torch.zeros(()) for _ in update.rates]
        return if_wanted(cls, wanted, torch.device("cuda"), generate, learn, learners)

    def search(self: VQGAN) -> CodebookSearch:
        # As on CUDA, where the values of the codebook are not compared at every call.
        if self._search is None:
            self._search = CodebookSearch(self.codebook.detach())
        return self._search

    with ExitStack() as stack:
        for owner, name, value in (
            (cuda_graph, "torch", Torch(cuda)),
            (prefetch, "torch", Torch(cuda)),
            (StepGraphs, "if_wanted", classmethod(on_cpu)),
            (VQGAN, "search", search),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        # In bfloat16 oneDNN's gradient of a strided convolution over a 1x1 map reads memory that
        # nobody wrote.
        was_enabled = torch.backends.mkldnn.set_flags(False)[0]
        stack.callback(torch.backends.mkldnn.set_flags, was_enabled)
        if watch:
            cuda.watch = Watch(cuda.current_stream)
            stack.enter_context(cuda.watch)
        yield cuda
