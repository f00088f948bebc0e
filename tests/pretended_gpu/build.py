"""Build the library of the pretended GPU for the installed torch, once, into a folder.

It stands in for libcudart, libcuda, cuBLAS, cuDNN, NCCL and NVML: device.cpp and libraries.cpp hold
the functions with a behaviour; every other function that torch imports is generated here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "device.cpp", HERE / "libraries.cpp")
NAMES = re.compile(r"(__)?(cuda|cublas|cudnn|cusolver|cusparse|cufft|nccl|nvml|cu(?=[A-Z]))\w*")
# Functions that libcuda's users look up by name.
DRIVER = """cuCtxSetCurrent cuCtxPushCurrent_v2 cuCtxGetLimit cuCtxSetLimit cuDeviceGetUuid cuInit
cuFuncSetAttribute cuFuncSetCacheConfig cuMemSetAccess cuMemUnmap cuMemsetD32Async cuModuleUnload
cuStreamWriteValue32 cuTensorMapEncodeTiled nvmlDeviceGetNvLinkRemoteDeviceType
nvmlDeviceGetNvLinkRemotePciInfo_v2 nvmlDeviceGetComputeRunningProcesses
nvmlSystemGetCudaDriverVersion_v2 nvmlInit_v2 nvmlInitWithFlags nvmlShutdown"""
CREATES = re.compile(r"(cublas|cudnn|cusolver|cusparse)\w*Create\w*")
DESTROYS = re.compile(r"(cublas|cudnn|cusolver|cusparse)\w*Destroy\w*")
COMPUTES = re.compile(
    r"cublas[A-Z][a-z]*(gemm|gemv|dot|trsm|getr|geqrf|gels|scal)\w*|cublasGemm\w*|cublasDotEx"
    r"|cudnn(BatchNorm|Convolution)\w*(Training|Backward|Inference|Forward|Data|Filter)(Ex)?"
    r"|cudnnBackendExecute",
    re.IGNORECASE,
)


def missing() -> str:
    """Return the reason why the library cannot be built here, or ""."""
    if sys.platform != "linux" or not all(map(shutil.which, ("g++", "nm"))):
        return "pretended GPU: needs Linux, g++ and nm"
    if not (torch_folder() / "lib/libtorch_cuda.so").exists() or not headers():
        return "pretended GPU: needs a CUDA build of torch with NVIDIA's packages"
    return ""


def torch_folder() -> Path:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def headers() -> list[Path]:
    """Return the include folders of the installed runtime, cuDNN and Triton, or []."""
    packages = torch_folder().parent
    nvidia = packages / "nvidia"
    found = [
        next(nvidia.glob(f"*/include/{name}"), None) for name in ("driver_types.h", "cudnn_graph.h")
    ]
    # The runtime's headers include crt/, which of these packages only Triton has.
    found.append(next(packages.glob("triton/backends/nvidia/include/crt"), None))
    return [path.parent for path in found if path] if all(found) else []


def build(folder: Path) -> Path:
    """Return the folder with libcuda.so.1, built unless it is there."""
    libraries = sorted((torch_folder() / "lib").glob("*.so"))
    key = hashlib.sha256()
    for path in (*SOURCES, Path(__file__)):
        key.update(path.read_bytes())
    key.update("".join(f"{path} {path.stat().st_size}" for path in libraries).encode())
    target = folder / key.hexdigest()[:16]
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder))
    includes = [f"-I{path}" for path in headers()]
    flags = ["-O1", "-fPIC", "-w"]
    objects = []
    for source in SOURCES:
        objects.append(str(work / f"{source.stem}.o"))
        run("g++", "-std=c++17", *flags, *includes, "-c", str(source), "-o", objects[-1])
    stubs = work / "stubs.c"
    stubs.write_text(generate(wanted(libraries) - symbols("--defined-only", objects)))
    run("gcc", *flags, "-c", str(stubs), "-o", str(work / "stubs.o"))
    library = work / "libcuda.so.1"
    run(
        *("g++", "-shared", "-Wl,-soname,libcuda.so.1", *objects, str(work / "stubs.o")),
        *("-o", str(library), "-ldl", "-lpthread"),
    )
    (work / "libnvidia-ml.so.1").symlink_to(library.name)
    os.rename(work, target)
    return target


def wanted(libraries: list[Path]) -> set[str]:
    """Return what torch and Triton's launcher import from NVIDIA's libraries."""
    launcher = torch_folder().parent / "triton/backends/nvidia/driver.c"
    imported = symbols("--undefined-only", [str(path) for path in libraries])
    own = symbols("--defined-only", [str(path) for path in libraries])
    names = {name for name in imported - own if NAMES.fullmatch(name)}
    return names | set(DRIVER.split()) | set(re.findall(r"\bcu[A-Z]\w+", launcher.read_text()))


def symbols(kind: str, files: list[str]) -> set[str]:
    dynamic = ["-D"] if files[0].endswith(".so") else []
    lines = run("nm", *dynamic, kind, *files).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if " " in line.strip()}


def generate(names: set[str]) -> str:
    """Return C code of functions that create, destroy, launch, or do nothing."""
    lines = [
        "#include <stdlib.h>",
        "int pretended_library(const char*, void*);",
        "int pretended_unknown(const char*);",
    ]
    for name in sorted(names):
        if CREATES.fullmatch(name):
            lines.append(f"int {name}(void** h) {{ *h = calloc(1, 1024); return 0; }}")
        elif DESTROYS.fullmatch(name):
            lines.append(f"int {name}(void* h) {{ free(h); return 0; }}")
        elif COMPUTES.fullmatch(name):
            lines.append(f'int {name}(void* h) {{ return pretended_library("{name}", h); }}')
        else:
            lines.append(f'int {name}() {{ return pretended_unknown("{name}"); }}')
    return "\n".join(lines) + "\n"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def environment(library: Path, **settings: object) -> dict[str, str]:
    """Return the environment of a process on the pretended GPU.

    settings: GIB (memory), CAPABILITY (90), COUNT of GPUs, VERBOSE.
    """
    return os.environ | {
        "LD_PRELOAD": str(library / "libcuda.so.1"),
        "LD_LIBRARY_PATH": f"{library}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(library),
        "TRITON_CACHE_DIR": str(library / "triton"),
        **{f"PRETENDED_GPU_{name.upper()}": str(value) for name, value in settings.items()},
    }
