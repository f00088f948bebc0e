"""Record the operations of a step on fake tensors: FLOP, bytes moved, and memory at its peak.

Fake tensors have shapes and strides and no content, so a step of the real size runs in seconds on
any machine. They are on the CPU, since autograd calls the driver for tensors of a CUDA device.
What differs on CUDA is made up for here: autocast runs norms in float32, and torch's group norm
takes and returns NCHW.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from dad_fast.loggers.profiling import naming_stages

aten = torch.ops.aten
# CUDA's allocator hands out blocks of multiples of this.
BLOCK = 512
# Kinds of work that run at different rates
PASS, MATMUL, CONV, ATTENTION = "pass", "matmul", "conv", "attention"
# Autocast of CUDA casts the inputs of these to float32, that of a CPU does not.
IN_FLOAT32 = (F.layer_norm, F.group_norm)
COPIES = ("clone", "contiguous", "_to_copy", "copy_")
# Write their first argument without reading it
OVERWRITING = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_")


@dataclass(frozen=True)
class Op:
    """One operation: a kernel, or a few.

    reads, writes: bytes by storage number. layout: bytes of copies between NCHW and NHWC. bias:
    bytes of a pass that adds a convolution's bias. dtype: of the inputs of matrix products.
    """

    name: str
    stages: tuple[str, ...]
    kind: str
    flop: int
    dtype: str
    reads: dict[int, int]
    writes: dict[int, int]
    layout: int = 0
    bias: int = 0

    @property
    def moved(self) -> int:
        """Bytes of the operation as one kernel of its own."""
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass
class Trace:
    """Operations in order, and memory in bytes.

    before: allocated before the first operation. peak: the most at any time. peaks: by stages.
    kept: numbers of the storages that were still there at the end.
    """

    ops: list[Op] = field(default_factory=list)
    before: int = 0
    peak: int = 0
    peaks: dict[tuple[str, ...], int] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)


class CudaAutocast(TorchFunctionMode):
    """Casts to float32 as CUDA's autocast does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu") and args[0].element_size() < 4:
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Make new tensors fake in this context, and run autograd on this thread."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # From copying a module, for the EMA.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(CudaAutocast())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # A CPU's own kernel of nn.MultiheadAttention.
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        yield mode


def make_fake(module: nn.Module) -> None:
    """Replace parameters and buffers by fake tensors of their shapes; shared ones stay shared."""
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is None or isinstance(old, FakeTensor):
                    continue
                if id(old) not in done:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    # `old` is kept, so that no other tensor gets its id.
                    done[id(old)] = new, old
                tensors[name] = done[id(old)][0]


class Recorder(TorchDispatchMode):
    """Records operations between `start` and `stop`, and counts memory all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._stages: list[str] = []
        self._sizes: dict[int, int] = {}
        self._numbers = WeakIdKeyDictionary()
        self._next = 0
        self._live = 0
        self._recording = False

    def start(self) -> None:
        self.trace = Trace(before=self._live, peak=self._live)
        self._recording = True

    def stop(self) -> Trace:
        self._recording = False
        self.trace.kept = set(self._sizes)
        return self.trace

    def count(self, module: nn.Module) -> None:
        """Count the memory of a module that exists already."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._number(tensor)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stages.append(name)
        try:
            yield
        finally:
            self._stages.pop()

    def naming_stages(self) -> Any:
        return naming_stages(self.stage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is torch.ops.prim.device:
            return func(*args, **kwargs)
        # Reading sizes and strides is no operation.
        with torch._C.DisableTorchFunction():
            return self._recorded(func, packet, args, kwargs)

    def _recorded(self, func: Any, packet: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if packet is aten.native_group_norm and not args[0].is_contiguous():
            # torch's CUDA kernel takes and returns NCHW.
            with self:
                args = (args[0].contiguous(), *args[1:])
        if packet is aten.convolution and is_nhwc(args[1]) and not is_nhwc(args[0]):
            # cuDNN takes NHWC if the weight has it.
            with self:
                args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
        ins = tensors_of((args, kwargs))
        known = {self._number(tensor) for tensor in ins}
        out = func(*args, **kwargs)
        outs = tensors_of(out)
        new = [tensor for tensor in outs if self._number(tensor) not in known]
        written = _written(func, args, kwargs)
        if not new and not written:
            # A view.
            return out

        op = self._op(packet, args, kwargs, ins, out, new, written)
        if self._recording:
            if op.flop or op.moved or op.layout:
                self.trace.ops.append(op)
            stages = tuple(self._stages)
            self.trace.peak = max(self.trace.peak, self._live)
            self.trace.peaks[stages] = max(self.trace.peaks.get(stages, 0), self._live)
        return out

    def _op(
        self,
        packet: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        ins: list[Tensor],
        out: Any,
        new: list[Tensor],
        written: list[Tensor],
    ) -> Op:
        name, outs = packet.__name__, tensors_of(out)
        is_empty = name.startswith(("empty", "new_empty"))
        reads = {} if name.startswith(OVERWRITING) else self._bytes(ins)
        if name.startswith(("copy_", "_foreach_copy_")):
            reads = self._bytes([tensor for tensor in ins if not _among(tensor, written)])
        writes = {} if is_empty else self._bytes([*new, *written])
        kind, flop, dtype, layout, bias = PASS, 0, "", 0, 0
        if "scaled_dot_product" in name:
            kind = ATTENTION
            flop = attention_flop(ins, backward=name.endswith("backward"))
        elif packet is aten.convolution_backward:
            kind, flop = CONV, convolution_backward_flop(args)
        elif packet in flop_registry:
            kind = CONV if "convolution" in name else MATMUL
            flop = int(flop_registry[packet](*args, **kwargs, out_val=out))
        if flop:
            # Labels of samples may come before the matrices.
            dtype = str(next(t for t in ins if t.is_floating_point()).dtype).removeprefix("torch.")
        if name == "convolution":
            bias = 2 * size(outs[0]) if args[2] is not None else 0
        elif name == "native_group_norm":
            reads = {number: 2 * count for number, count in reads.items()}
        elif name in COPIES and outs and ins[-1].ndim == 4:
            if is_nhwc(ins[-1]) != is_nhwc(outs[0]) and ins[-1].shape[1] > 1:
                reads, writes, layout = {}, {}, size(ins[-1]) + size(outs[0])
        return Op(name, tuple(self._stages), kind, flop, dtype, reads, writes, layout, bias)

    def _bytes(self, tensors: list[Tensor]) -> dict[int, int]:
        """Return bytes by storage number; parts of one storage that are given twice count once."""
        found: dict[int, int] = {}
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            number = self._number(tensor)
            found[number] = found.get(number, 0) + size(tensor)
        return found

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage)
        if number is None:
            number = self._next
            self._next += 1
            self._numbers[storage] = number
            allocated = -(-storage.nbytes() // BLOCK) * BLOCK
            self._sizes[number] = allocated
            self._live += allocated
            weakref.finalize(storage, self._free, number)
        return number

    def _free(self, number: int) -> None:
        self._live -= self._sizes.pop(number)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(tensor: Tensor) -> int:
    """Return the bytes that a kernel reads or writes: expanded dimensions count once."""
    count = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or length == 0:
            count *= length
    return count


def is_nhwc(tensor: Tensor) -> bool:
    """Return whether the strides of a map or weight [N, C, H, W] are those of NHWC."""
    is_map = tensor.ndim == 4 and tensor.shape[1] > 1
    return is_map and tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]


def attention_flop(tensors: list[Tensor], backward: bool) -> int:
    """Return the FLOP of two matrix products, or of the four of the backward pass."""
    q, _, v = tensors[1:4] if backward else tensors[:3]
    queries, width = q.shape[-2:]
    keys, values = v.shape[-2:]
    products = 2 * math.prod(q.shape[:-2]) * queries * keys
    return products * (2 * (width + values) if backward else width + values)


def convolution_backward_flop(args: tuple[Any, ...]) -> int:
    """Return the FLOP of the gradients of images and weights, of which each takes the products of
    the forward pass. torch's own count takes all groups of the weights' gradient for one.
    """
    gradient, images, weight = args[:3]
    is_transposed, wanted = args[7], args[10]
    forward = conv_flop_count(images.shape, weight.shape, gradient.shape, is_transposed)
    return int(sum(wanted[:2]) * forward)


def _written(func: Any, args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
    """Return the tensors that the operation changes in place."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += tensors_of(value)
    return found


def _among(tensor: Tensor, tensors: list[Tensor]) -> bool:
    return any(tensor is other for other in tensors)
