"""Kernel report: every Triton kernel and csrc/*.cu compiles for sm_80 and sm_90 without a GPU.

No kernel spills, the designed ones use tensor cores, and the table of meta-parameters fits.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels import cross_compile, report, tuning

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def call(*arguments, **environment):
    command = [sys.executable, "-m", "dad_fast.kernels.report", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )


@pytest.fixture(scope="module", params=["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def rows(request):
    pytest.importorskip("triton.backends.nvidia")
    done = call("--only", "triton", "--json", "--arch", request.param)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["kernels"]


def label(row):
    return f"{row['name']} for {row['arch']} with {row['constants']}, {row['options']}"


def test_no_kernel_spills(rows):
    assert [label(row) for row in rows if row["spills"]] == []


def test_kernels_use_tensor_cores_as_designed(rows):
    assert [
        label(row)
        for row in rows
        if row["tensor_cores_expected"] and not row["tensor_core_instructions"]
    ] == []
    assert all(
        "HGMMA" in row["tensor_core_instructions"]
        for row in rows
        if row["arch"] == "sm_90" and "gemm_kernel" in row["name"]
    )


def test_every_kernel_fits_on_a_multiprocessor(rows):
    for row in rows:
        assert row["shared"] <= cross_compile.LIMITS[row["arch"]][4] and row["occupancy"] > 0, (
            label(row)
        )


def test_the_search_leaves_shared_memory_to_other_blocks(rows):
    found = [row for row in rows if row["name"].startswith("nearest_code: ")]
    assert {row["name"] for row in found} >= {
        "nearest_code: small, D=4: score_kernel",
        "nearest_code: gemm, D=256: gemm_kernel",
        "nearest_code: small, D=4: settle_kernel",
    }
    for row in found:
        if "small" in row["name"] or "settle_kernel" in row["name"]:
            assert row["shared"] <= 64 << 10, label(row)


def test_every_module_with_a_kernel_is_in_the_report(rows):
    modules = {name.rpartition(".")[2] for name in cross_compile.triton_modules()}
    assert {"triton_small", "triton_gemm", "triton_common", "pack_codes_triton"} <= modules
    assert len(rows) == len(cross_compile.all_specs(rows[0]["arch"]))


def test_no_subnormals_are_flushed_in_exact_parts():
    """Only the square root of the band may flush. The fp64 settlement has no contraction."""
    for spec in cross_compile.all_specs("sm_90"):
        if spec.name.startswith("nearest_code: "):
            text = cross_compile.compile_triton(spec, "sm_90").asm["ptx"]
            assert {
                line.split()[0] for line in text.splitlines() if ".ftz" in line and line.split()
            } <= {"sqrt.approx.ftz.f32"}, spec.name
            assert "fma.rn.f64" not in text and "fma.rn.f32" not in text, spec.name


def test_table_and_names():
    done = call("pack_codes: 14", "--only", "triton", "--arch", "sm_80")
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split()[:4] == ["kernel", "arch", "warps", "stages"] and len(lines) == 2
    assert all("sm_80" in line for line in lines)


def test_report_under_the_interpreter_is_refused():
    done = call("pack_codes: 14", "--only", "triton", "--arch", "sm_80", TRITON_INTERPRET="1")
    message = "report: TRITON_INTERPRET is set: the interpreter compiles nothing; unset it"
    assert (done.returncode, done.stderr.strip()) == (3, message)


def test_missing_tools_are_one_line_and_exit_3(monkeypatch, capsys):
    def missing(name):
        raise EnvironmentProblem(f"{name} is missing; install it")

    monkeypatch.setattr(cross_compile, "tool", missing)
    assert report.main(["pack_codes: 14", "--only", "triton", "--arch", "sm_80"]) == 3
    assert capsys.readouterr().err == "report: cuobjdump is missing; install it\n"


def test_no_nvcc_is_one_line_and_exit_3(monkeypatch, capsys, tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void f() {}\n")
    monkeypatch.setattr(report, "cuda_sources", lambda: [source])
    monkeypatch.setattr(
        cross_compile,
        "nvcc",
        lambda: (_ for _ in ()).throw(EnvironmentProblem("nvcc is not on PATH")),
    )
    pytest.importorskip("tvm_ffi")
    assert report.main(["--only", "cuda"]) == 3
    assert capsys.readouterr().err == "report: nvcc is not on PATH\n"


def nvcc_or_skip():
    try:
        cross_compile.nvcc()
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
    pytest.importorskip("tvm_ffi")


def test_cuda_sources_are_read(monkeypatch, capsys, tmp_path):
    """Registers and spills of a kernel that must spill, and a source that does not compile."""
    nvcc_or_skip()
    good, bad = tmp_path / "good.cu", tmp_path / "bad.cu"
    good.write_text(
        "__global__ void copy(float* x) { x[threadIdx.x] += 1; }\n"
        "__global__ void spill(float* x, int n) {\n"
        "  float y[64];\n"
        "  for (int i = 0; i < 64; ++i) y[i] = x[i * n];\n"
        "  for (int i = 0; i < n; ++i) y[int(x[i]) & 63] += 1;\n"
        "  x[0] = y[n & 63];\n"
        "}\n"
    )
    bad.write_text("__global__ void f() { undeclared(); }\n")
    monkeypatch.setattr(report, "cuda_sources", lambda: [good, bad])
    assert report.main(["--only", "cuda", "--arch", "sm_90", "--json"]) == 1
    out = capsys.readouterr()
    found = {row["name"].removeprefix("good.cu: "): row for row in json.loads(out.out)["kernels"]}
    assert not found["copy"]["spills"] and found["spill"]["spills"]
    assert found["spill"]["stack"] >= 256
    assert "bad.cu for sm_90" in out.err and len(out.err.splitlines()) == 1


def test_csrc_kernels_do_not_spill():
    nvcc_or_skip()
    if not cross_compile.cuda_sources():
        pytest.skip("csrc has no .cu")
    done = call("--only", "cuda", "--json")
    assert done.returncode == 0, done.stderr
    assert [label(row) for row in json.loads(done.stdout)["kernels"] if row["spills"]] == []


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 255, 0, 8, 0.125),
        ("sm_80", 128, 100 << 10, 8, 0.125),
        ("sm_90", 128, 100 << 10, 8, 0.25),
        ("sm_80", 32, 0, 1, 0.5),
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert cross_compile.occupancy(arch, registers, shared, warps) == expected


def test_the_table_of_meta_parameters():
    table = json.loads(tuning.TABLE.read_text())
    for kernel, by_arch in table.items():
        assert set(by_arch) == set(cross_compile.ARCHITECTURES), kernel
        for entries in by_arch.values():
            assert entries[-1]["max"] == {} and all(entry["max"] for entry in entries[:-1])
    assert tuning.meta_parameters("nearest_code_small", "sm_90", n=10**9)["slots"] % 32 == 0
    assert "max" not in tuning.meta_parameters("nearest_code_gemm", "sm_80", d=64)
    with pytest.raises(KeyError):
        tuning.meta_parameters("no such kernel", "sm_90", n=1)
    assert tuning.TABLE.read_text() == tuning.render(table)


def test_tuning_begins_with_the_entry_of_the_table():
    own = {
        name: v
        for name, v in tuning.entries("group_norm_silu", "sm_90")[0].items()
        if name != "max"
    }
    others = [own | {"num_warps": 32 + i} for i in range(20)]
    bounds = tuning.entries("group_norm_silu", "sm_90")[0]["max"]
    case = tuning.TuningCase("group_norm_silu", bounds, [*others, own], print)
    ordered = tuning.in_order(case, "sm_90")
    assert ordered[0] == own and ordered[1:] != others
    assert sorted(map(str, ordered)) == sorted(map(str, case.candidates))
    assert ordered == tuning.in_order(case, "sm_90")


def test_tuning_without_a_gpu_is_one_line_and_exit_3(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.main([]) == 3
    assert capsys.readouterr().err.startswith("tuning: torch sees no CUDA device here")


@pytest.mark.gpu
def test_tuning_measures_and_names_unknown_kernels(capsys):
    assert tuning.main(["no_such_kernel"]) == 2
    assert "there are" in capsys.readouterr().err
    case = tuning.TuningCase("x", {}, [{"warps": 1}, {"warps": 2}], lambda meta: None)
    assert len(tuning.measure(case)) == 2


@pytest.mark.parametrize("name", cross_compile.triton_modules())
def test_every_launch_is_on_the_device_of_its_tensors(name):
    """By default Triton launches on the current device, which may be another one."""
    tree = ast.parse(Path(importlib.import_module(name).__file__).read_text(encoding="utf-8"))
    launches = {
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and "device_of" in ast.unparse(node.items[0])
    ]
    guarded = {node for guard in guards for node in ast.walk(guard)}
    assert launches and launches <= guarded
