"""Cross-compile Triton kernels and CUDA sources without a GPU; read registers, spills and SASS from
the binaries.

`report_launches(arch)` of each module with a Triton kernel makes its launches at the sizes of a
published model. They are recorded, not run (launches.py), and Triton compiles the variants that
they would use on that GPU; the tools (ptxas, cuobjdump, nvdisasm) come with Triton.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels.launches import CompileSpec, variants
from dad_fast.kernels.tuning import triton_modules

ARCHITECTURES = ("sm_80", "sm_90")
# Per multiprocessor: registers, warps, blocks, bytes of shared memory. The last number is the limit
# of one block.
LIMITS = {
    "sm_80": (65536, 64, 32, 164 << 10, 163 << 10),
    "sm_90": (65536, 64, 32, 228 << 10, 227 << 10),
}
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA|DMMA|QGMMA)\b")
LOCAL_MEMORY = re.compile(r"\b(STL|LDL)\b")
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Binary:
    """Resources that one kernel needs of a GPU."""

    name: str
    arch: str
    constants: dict[str, Any]
    options: dict[str, Any]
    registers: int  # per thread
    stack: int  # bytes per thread; spilled registers live here
    local_instructions: int  # loads and stores of local memory
    shared: int  # bytes per block
    instructions: int
    tensor_core_instructions: dict[str, int]
    tensor_cores_expected: bool
    # Resident warps over the most possible; None: the block's size is the caller's choice.
    occupancy: float | None

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local_instructions > 0


def occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """Return resident warps over the multiprocessor's limit.

    By CUDA's allocation rules: registers in units of 256 a warp, 1 KiB reserved per block.
    """
    all_registers, all_warps, all_blocks, all_shared, _ = LIMITS[arch]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(
        all_registers // (per_warp * warps),
        all_warps // warps,
        all_blocks,
        all_shared // (shared + 1024),
    )
    return blocks * warps / all_warps


def tool(name: str) -> str:
    """Return the path of one of NVIDIA's tools: Triton's own, else that on PATH.

    Raises EnvironmentProblem without one.
    """
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        raise EnvironmentProblem(
            f"{name} is neither in Triton's package nor on PATH; install NVIDIA's CUDA toolkit, or a Triton wheel that has it"
        )
    return found


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{Path(command[0]).name} failed: {lines[-1]}")
    return result.stdout + result.stderr


def all_specs(arch: str) -> list[CompileSpec]:
    """Return the variants that the launches of all modules compile.

    A module whose kernels another module launches makes no launches itself.
    """
    modules = map(importlib.import_module, triton_modules())
    launches = (
        launch
        for module in modules
        if hasattr(module, "report_launches")
        for launch in module.report_launches(arch)
    )
    return variants(arch, launches)


def compile_triton(spec: CompileSpec, arch: str) -> Any:
    """Triton's compiled kernel (`.asm`, `.metadata`) for an architecture, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    signature = {name: spec.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible}
    source = ASTSource(spec.kernel, signature, spec.constants, attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options=dict(spec.options),
    )


def read_cubin(cubin: Path) -> dict[str, dict[str, Any]]:
    """{kernel: registers, stack, shared, sass} of a binary."""
    listing = _run([tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", str(cubin)])
    kernels = {}
    for match in re.finditer(r"Function (\S+?):\s*\n\s*(REG:.*)", listing):
        numbers = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", match[2])}
        kernels[match[1]] = {
            "registers": numbers["REG"],
            "stack": numbers["STACK"],
            "shared": numbers["SHARED"],
            "sass": "",
        }
    for part in re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        if name.strip() in kernels:
            kernels[name.strip()]["sass"] = "\n".join(
                line for line in body.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)
            )
    return kernels


def _binary(name: str, arch: str, found: dict[str, Any], **rest: Any) -> Binary:
    sass = found["sass"]
    return Binary(
        name=name,
        arch=arch,
        registers=found["registers"],
        stack=found["stack"],
        local_instructions=len(LOCAL_MEMORY.findall(sass)),
        instructions=len(sass.splitlines()),
        tensor_core_instructions=dict(Counter(TENSOR_CORE.findall(sass))),
        **rest,
    )


def triton_binary(spec: CompileSpec, arch: str) -> Binary:
    compiled = compile_triton(spec, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (found,) = read_cubin(cubin).values()
    shared = compiled.metadata.shared
    return _binary(
        spec.name,
        arch,
        found,
        constants=spec.constants,
        options=spec.options,
        shared=shared,
        tensor_cores_expected=spec.tensor_cores,
        occupancy=occupancy(arch, found["registers"], shared, compiled.metadata.num_warps),
    )


def cuda_sources() -> list[Path]:
    """csrc/*.cu of a checkout; an installed package has none."""
    return sorted((FOLDER.parent / "csrc").glob("*.cu"))


def nvcc() -> str:
    candidates = [shutil.which("nvcc")] + [
        f"{os.environ[name]}/bin/nvcc"
        for name in ("CUDA_HOME", "CUDA_PATH")
        if os.environ.get(name)
    ]
    for path in [*candidates, "/usr/local/cuda/bin/nvcc"]:
        if path and Path(path).is_file():
            return path
    raise EnvironmentProblem(
        "nvcc is not on PATH, and CUDA_HOME names none; csrc/*.cu need it: install NVIDIA's CUDA toolkit (or --only triton)"
    )


def cuda_binaries(source: Path, arch: str) -> list[Binary]:
    """Every kernel of a .cu file, compiled as CMakeLists.txt does."""
    include = [f"-I{path}" for path in _tvm_ffi_includes()]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = "sm_90a" if arch == "sm_90" else arch
        _run(
            [
                nvcc(),
                "-cubin",
                f"-arch={target}",
                "-std=c++17",
                "-O3",
                "--expt-relaxed-constexpr",
                *include,
                str(source),
                "-o",
                str(cubin),
            ]
        )
        kernels = read_cubin(cubin)
    return [
        _binary(
            f"{source.name}: {_demangled(name)}",
            arch,
            found,
            constants={},
            options={},
            shared=found["shared"],
            tensor_cores_expected=False,
            occupancy=None,
        )
        for name, found in kernels.items()
    ]


def _tvm_ffi_includes() -> list[str]:
    try:
        from tvm_ffi import libinfo
    except ImportError as error:
        raise EnvironmentProblem(
            f"{error}; csrc/*.cu include its headers: pip install apache-tvm-ffi (or --only triton)"
        ) from None
    return [libinfo.find_include_path(), libinfo.find_dlpack_include_path()]


def _demangled(name: str) -> str:
    filter_tool = shutil.which("c++filt")
    if filter_tool is None:
        return name
    plain = (
        _run([filter_tool, name])
        .strip()
        .replace("(anonymous namespace)::", "")
        .removeprefix("void ")
    )
    return re.sub(r"\(.*", "", plain)
