"""csrc's CUDA kernel compiled by a C++ compiler and run on the CPU (host_cuda/cuda_runtime.h),
against the exact search in fp64: any latents, any codebook, every dimension that it serves.

A GPU runs 32 lanes at once and rounds alike; time, memory spaces and caches are not imitated.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dad_fast.kernels import csrc_status
from dad_fast.kernels.csrc import csrc
from dad_fast.kernels.nearest_code import grid_search
from tests.codebooks import DATA, exact_hits, grid_codes, midway, normal, off_centre, outside

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "nearest_code_grid.cu"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(csrc() is None, reason=csrc_status()),
    pytest.mark.skipif(
        COMPILER is None or not sys.platform.startswith("linux"),
        reason="needs Linux and a C++ compiler",
    ),
]


def compiled(folder: Path, source: str, *flags: str) -> Path:
    """Compile the text of the .cu file for the host; return the library."""
    libinfo = pytest.importorskip("tvm_ffi.libinfo")
    # NAME<<<blocks, threads, shared, stream>>>(arguments) is no C++.
    source = re.sub(r"(\w+)<<<(.*?)>>>\(", r"host_cuda::launch(\1, \2)(", source, flags=re.DOTALL)
    assert "host_cuda::launch(search_kernel" in source
    (folder / "kernel.cpp").write_text(source)
    library = folder / "kernel.so"
    includes = (Path(__file__).parent / "host_cuda", ROOT / "csrc", *libinfo.include_paths())
    command = [
        str(COMPILER),
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
        *(f"-I{path}" for path in includes),
        *flags,
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(folder / "kernel.cpp"),
        libinfo.find_libtvm_ffi(),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


@functools.cache
def kernel() -> Any:
    import tvm_ffi

    with tempfile.TemporaryDirectory() as folder:
        return tvm_ffi.load_module(str(compiled(Path(folder), SOURCE.read_text())))


def search(library: Any, z: Tensor, e: Tensor) -> tuple[Tensor, int, Tensor]:
    """Return the codes of the CUDA kernel, its count of non-finite latents, and the grid."""
    grid = grid_search.build_grid(e.contiguous())
    codes = torch.full((len(z),), -7, dtype=torch.int64)
    num_nonfinite = torch.zeros((), dtype=torch.int64)
    header = grid[:256].clone()
    library.grid_search_cuda(z.contiguous(), header, grid, codes, num_nonfinite)
    return codes, int(num_nonfinite), grid


def exact(z: Tensor, e: Tensor) -> Tensor:
    """Search in fp64, each term rounded and summed in order; the first of equal codes wins.

    Codes that are not finite lose; the code of a latent that is not finite is 0.
    """
    codes = torch.empty(len(z), dtype=torch.int64)
    for first in range(0, len(z), 512):
        rows = z[first : first + 512].double()
        distance = torch.zeros(len(rows), len(e), dtype=torch.float64)
        for d in range(z.shape[1]):
            distance += (rows[:, d, None] - e[None, :, d].double()).square()
        distance[:, ~e.isfinite().all(1)] = torch.inf
        codes[first : first + 512] = distance.argmin(1)
    return torch.where(z.isfinite().all(1), codes, 0)


def assert_exact(library: Any, z: Tensor, e: Tensor) -> None:
    codes, num_nonfinite, _ = search(library, z, e)
    assert torch.equal(codes, exact(z, e))
    assert num_nonfinite == int((~z.isfinite().all(1)).sum())


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_codes_are_exact(data, dim: int) -> None:
    assert_exact(kernel(), *data(301, 200, dim))


@pytest.mark.parametrize("num", [1, 31, 32, 33, 127, 128, 129])
def test_any_number_of_latents(num: int) -> None:
    assert_exact(kernel(), *normal(num, 77, 4))


def test_no_latents_and_one_code() -> None:
    codes, num_nonfinite, _ = search(kernel(), torch.empty(0, 4), torch.randn(9, 4))
    assert len(codes) == num_nonfinite == 0
    assert_exact(kernel(), torch.randn(50, 4), torch.randn(1, 4))


def hostile_latents(num: int) -> tuple[Tensor, Tensor]:
    z, e = normal(num, 700, 4)
    z[::7] = torch.nan
    z[::11, 2] = torch.inf
    z[5::13] *= 1e6
    z[6::17] *= 1e20
    z[3::19] = 3e38
    z[4::23] *= 1e-40
    return z, e


def test_latents_that_are_not_finite_or_far_away() -> None:
    assert_exact(kernel(), *hostile_latents(1001))


def test_codes_that_are_not_finite_lose() -> None:
    z, e = normal(600, 500, 4)
    e[::5] = torch.nan
    e[3::7, 1] = -torch.inf
    assert_exact(kernel(), z, e)


def test_many_latents_of_many_codes() -> None:
    """As the search on the CPU, which other tests compare with fp64."""
    for data in (normal, off_centre, midway):
        z, e = data(20001, 4096, 4)
        codes, _, grid = search(kernel(), z, e)
        assert torch.equal(codes, grid_codes(z, grid))


@pytest.mark.slow
@pytest.mark.parametrize("data", [normal, off_centre, exact_hits, outside])
def test_codebook_of_f8(data) -> None:
    assert_exact(kernel(), *data(2001, 16384, 4))


FAULTS = {
    "the last of equal codes wins": ("candidate < code)", "candidate > code)"),
    "the band is too narrow": ("const float end = band_end4(best);", "const float end = best;"),
    "the second best is not kept": ("second = fminf(second, fmaxf(best, at));", ""),
    "a leaf lacks its last code": ("i < last; ++i", "i + 1 < last; ++i"),
    "far latents are searched by one lane": ("row += 32)", "row += 64)"),
    "lanes without a latent count": ("live && !finite);", "!finite || !live);"),
    "another lane's latent": ("(kWholeWarp, z.w, owner)", "(kWholeWarp, z.w, owner + 1)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_in_the_kernel_are_found(fault: tuple[str, str], tmp_path: Path) -> None:
    import tvm_ffi

    source = SOURCE.read_text()
    assert fault[0] in source
    library = tvm_ffi.load_module(str(compiled(tmp_path, source.replace(*fault))))
    found = 0
    for data in (*DATA, lambda n, k, d: hostile_latents(n)):
        z, e = data(301, 200, 4)
        codes, num_nonfinite, _ = search(library, z, e)
        found += not torch.equal(codes, exact(z, e))
        found += num_nonfinite != int((~z.isfinite().all(1)).sum())
    assert found


SANITIZED = """
import sys
from pathlib import Path
import tvm_ffi
from tests.codebooks import DATA
from tests.kernels.test_grid_cuda_on_host import assert_exact, hostile_latents
library = tvm_ffi.load_module(sys.argv[1])
for data in DATA:
    for dim in (1, 4):
        assert_exact(library, *data(131, 300, dim))
assert_exact(library, *hostile_latents(301))
print("clean")
"""


@pytest.mark.slow
def test_reads_and_writes_stay_within_bounds(tmp_path: Path) -> None:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    library = compiled(tmp_path, SOURCE.read_text(), *flags)
    runtime = subprocess.run(
        [str(COMPILER), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]
