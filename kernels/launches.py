"""Record launches of Triton kernels without running them: which variants a run would compile.

Triton compiles a kernel once per type, constant and option, and per specialization of each other
argument: a pointer or integer that 16 divides, an integer that is 1. Whether a load is vectorized
depends on it. The rules below are those of Triton 3.6 to 3.9 for NVIDIA GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels import tuning

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class CompileSpec:
    """Variant of a Triton kernel: `types` per argument ("*fp32", "i32", "fp32" ...), `constants`
    the constexpr arguments and integers that are 1, `divisible` the arguments that 16 divides.
    """

    name: str
    kernel: Any  # triton.JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, enable_fp_fusion

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for launches that share a compiled kernel."""
        tables = self.types, self.constants, self.options
        texts = (str(sorted(table.items())) for table in tables)
        return self.kernel.fn, self.divisible, *texts

    @property
    def tensor_cores(self) -> bool:
        """True if the kernel multiplies matrices, which must not fall back to other units."""
        return "tl.dot(" in self.kernel.src


@contextmanager
def recorded(arch: str) -> Iterator[list[CompileSpec]]:
    """Collect the variants that launches inside would compile on `arch`; nothing is launched.

    Raises EnvironmentProblem under Triton's interpreter, which would run the kernels.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise EnvironmentProblem(
            "TRITON_INTERPRET is set: the interpreter compiles nothing; unset it"
        )
    specs: list[CompileSpec] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        specs.append(_spec(kernel, args, named))

    run = triton.JITFunction.run
    triton.JITFunction.run, tuning.assumed_architecture = record, arch
    try:
        yield specs
    finally:
        triton.JITFunction.run, tuning.assumed_architecture = run, ""


def variants(arch: str, launches: Iterable[tuple[str, Callable[[], object]]]) -> list[CompileSpec]:
    """Return each variant that the named launches compile on `arch`, once."""
    found: dict[tuple[object, ...], CompileSpec] = {}
    for name, launch in launches:
        with recorded(arch) as specs:
            launch()
        for spec in specs:
            function = spec.kernel.fn.__name__.strip("_")
            named = CompileSpec(**{**vars(spec), "name": f"{name}: {function}"})
            found.setdefault(spec.key, named)
    return list(found.values())


def _spec(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> CompileSpec:
    given = dict(zip(kernel.arg_names, args, strict=False))
    options: dict[str, Any] = {}
    for name, value in named.items():
        (given if name in kernel.arg_names else options)[name] = value
    types, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one or value is None:
            constants[name] = value
            continue
        types[name] = _type(value)
        may_align = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if may_align and type(address) is int and address % 16 == 0:
            divisible.append(name)
    return CompileSpec("", kernel, types, constants, tuple(divisible), options)


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
