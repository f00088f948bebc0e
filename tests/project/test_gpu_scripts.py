"""scripts/gpu_check and scripts/gpu_report: verdicts, limits, the manifest, and tables of committed
records.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.processes import HANG, wait_until

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_check, gpu_report = script("gpu_check"), script("gpu_report")
gpu_parts, gpu_targets = sys.modules["gpu_parts"], sys.modules["gpu_targets"]
OPTIONS = SimpleNamespace(device="cpu", limit=590.0, steps=2, batch_size=2, workers=0)


@pytest.fixture(autouse=True)
def _keep_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAD_FAST_CACHE", os.environ.get("DAD_FAST_CACHE", ""))
    monkeypatch.delenv("OUT", raising=False)


def run_part(
    monkeypatch: pytest.MonkeyPatch, out: Path, part: Any, name: str = "demo", **options: Any
) -> dict[str, Any]:
    pytest.importorskip("torch")
    monkeypatch.setitem(gpu_check.PARTS, name, part)
    gpu_check.check(name, SimpleNamespace(**(vars(OPTIONS) | options)), out)
    return json.loads((out / f"{name}.json").read_text())


def test_verdicts_and_the_manifest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(run: Any) -> dict[str, Any]:
        run.call(sys.executable, "-c", "print('what went wrong'); raise SystemExit(7)")
        return {}

    def skips(run: Any) -> dict[str, Any]:
        gpu_parts.require("json", "no_such_package")
        return {}

    assert (
        run_part(monkeypatch, tmp_path, skips, "ncu")["reason"] == "not installed: no_such_package"
    )
    failed = run_part(monkeypatch, tmp_path, fails)
    assert (failed["verdict"], failed["reason"]) == (
        "failed",
        "RuntimeError: exit code 7: what went wrong",
    )
    assert "what went wrong" in (tmp_path / "demo.log").read_text()
    # Run again: replaces its entry.
    assert run_part(monkeypatch, tmp_path, lambda run: {"found": 1})["found"] == 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [(entry["part"], entry["verdict"]) for entry in manifest] == [
        ("demo", "passed"),
        ("ncu", "skipped"),
    ]


def test_a_part_that_runs_too_long_is_stopped_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start = time.monotonic()
    sleeps = lambda run: {"line": run.call(sys.executable, "-c", "import time; time.sleep(3600)")}  # noqa: E731
    result = run_part(monkeypatch, tmp_path, sleeps, limit=0.5)
    assert (
        result["verdict"] == "failed"
        and "ran past 0.5 s" in result["reason"]
        and time.monotonic() - start < HANG
    )


def test_children_of_a_part_end_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Surviving workers would keep the GPU's memory and time."""
    child = tmp_path / "child"
    code = f"""
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(3600)"])
Path({str(child)!r}).write_text(str(child.pid))
time.sleep(3600)
"""
    limit = 3.0
    while not child.exists():  # a busy machine takes longer to start it
        result = run_part(
            monkeypatch,
            tmp_path,
            lambda run: {"line": run.call(sys.executable, "-c", code)},
            limit=limit,
        )
        assert "ran past" in result["reason"]
        limit *= 3

    def ended() -> bool:
        try:
            os.kill(int(child.read_text()), 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{child.read_text()}/stat")
        # A zombie: its exit code was not collected.
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"

    wait_until(ended)


def test_results_are_packed_to_out_after_a_killed_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, target = tmp_path / "results", tmp_path / "target"
    out.mkdir()
    monkeypatch.setenv("OUT", str(target))

    def cut_off(run: Any) -> dict[str, Any]:
        run.call(
            sys.executable,
            "-c",
            "print('FAILED tests/test_a.py::b - assert 1 == 2'); raise SystemExit(1)",
        )
        return {}

    def killed(run: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    run_part(monkeypatch, out, cut_off, "tests")
    with pytest.raises(KeyboardInterrupt):
        run_part(monkeypatch, out, killed, "ncu")
    assert sorted(path.name for path in target.iterdir()) == ["gpu_check.tar.gz", "summary.txt"]
    text = (target / "summary.txt").read_text()
    assert "    FAILED tests/test_a.py::b - assert 1 == 2" in text and re.search(
        r"^ncu +running", text, re.MULTILINE
    )
    with tarfile.open(target / "gpu_check.tar.gz") as archive:
        assert {
            "gpu_check/tests.json",
            "gpu_check/tests.log",
            "gpu_check/ncu.json",
            "gpu_check/manifest.json",
        } <= set(archive.getnames())
    monkeypatch.setattr(gpu_check, "SUMMARY_CHARACTERS", 100)
    assert len(gpu_check.summary(out)) == 101


def test_targets_are_read_from_records_of_a_gpu_at_size_paper(tmp_path: Path) -> None:
    assert gpu_targets.targets(tmp_path) == []
    folder = tmp_path / "paper-some-gpu"
    folder.mkdir()
    steps = record() | {"group": "steps"}
    rows = steps["comparisons"][0]["rows"]
    rows[1] |= {"name": gpu_targets.PAPER, "ratio": rows[1]["ratio"] | {"median": 5.1}}
    steps["comparisons"][0]["name"] = "batch 256"
    (folder / "steps.json").write_text(json.dumps(steps | {"machine": record("cpu")["machine"]}))
    assert gpu_targets.targets(tmp_path) == []
    (folder / "steps.json").write_text(json.dumps(steps))
    lines = gpu_targets.targets(tmp_path)
    assert len(lines) == 1 + len(gpu_targets.TARGETS)
    assert re.fullmatch(
        r"dad online, paper's order, ViT-B/16 +<= 5.3 x +5.1 x  met", lines[1]
    ) and lines[2].endswith(" -")


def test_every_target_names_rows_that_the_benchmarks_have() -> None:
    """Every row that a target looks up is written by a benchmark."""
    text = "".join(
        (ROOT / "benchmarks" / f"test_{group}.py").read_text()
        for group in ("steps", "stages", "stored")
    )
    names = [
        gpu_targets.PAPER,
        gpu_targets.AUTHORS,
        *gpu_targets.STAGES,
        "filling: adversarial images",
        "dad, stored images",
    ]
    assert [
        name
        for name in [*names, "dad, stored images and outputs", "dad, stored codes"]
        if f'"{name}"' not in text
    ] == []
    assert (
        '"ResNet-50, batch 256"' in text
        and 'f"batch {len(work.batch.labels)}, graphs, {name}"' in text
    )


def test_the_calls_for_half_an_hour_hold_known_parts() -> None:
    planned = [part for call in gpu_check.CALLS.values() for part in call]
    assert set(planned) <= gpu_check.PARTS.keys() and len(planned) == len(set(planned))
    assert all(f"--minutes 9.5 {call} " in gpu_check.__doc__ for call in gpu_check.CALLS)


def test_a_missing_tool_or_benchmark_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, part in (("nsys", gpu_parts.nsys), ("ncu", gpu_parts.ncu)):
        assert run_part(monkeypatch, tmp_path, part, name)["reason"] == f"not on the PATH: {name}"


def test_every_benchmark_file_is_a_part_and_skips_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py")}
    assert {f"bench-{group}" for group in files} <= gpu_check.PARTS.keys() and "steps" in files
    monkeypatch.setattr(
        gpu_parts.Context,
        "pytest",
        lambda run, *arguments: f"=== {len(arguments)} skipped in 1 s ===",
    )
    result = run_part(monkeypatch, tmp_path, gpu_check.PARTS["bench-steps"], "bench-steps")
    assert (result["verdict"], result["reason"]) == (
        "skipped",
        "nothing ran: === 8 skipped in 1 s ===",
    )


def test_missing_gpu_and_unknown_parts_are_errors() -> None:
    torch = pytest.importorskip("torch")
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh")]
    environment = os.environ | {"PYTHON": sys.executable}
    unknown = subprocess.run([*command, "stepz"], capture_output=True, text=True, env=environment)
    assert unknown.returncode == 2 and "unknown part stepz (parts: doctor," in unknown.stderr
    if not torch.cuda.is_available():
        done = subprocess.run([*command, "tests"], capture_output=True, text=True, env=environment)
        assert done.returncode == 3 and "no CUDA device" in done.stderr


def record(kind: str = "cuda") -> dict[str, Any]:
    spread = {"median": 2.0, "q1": 1.5, "q3": 2.5, "min": 1.0, "n": 9}
    rows = [
        {
            "name": "kd (timm)",
            "ms": spread,
            "ratio": spread | {"median": 1.0},
            "per_second": 3280.0,
            "tflops": 400.0,
            "joules": 0.5,
        },
        {
            "name": "dad",
            "ms": spread,
            "ratio": spread,
            "per_second": 1000.0,
            "tflops": 600.0,
            "predicted": 5.2,
            "peak_bytes": 2**30,
        },
    ]
    gemm = [{"name": "8192", "ms": spread, "ratio": spread, "per_second": 1.0, "tflops": 800.0}]
    device = {
        "kind": kind,
        "cpu": "Some CPU",
        "threads": 2,
        "name": "NVIDIA H200",
        "driver": "580.1",
    }
    return {
        "schema": 1,
        "group": "stages",
        "size": "paper",
        "taken": "2026-11-21T07:00:00Z",
        "seconds": 1,
        "machine": {
            "device": device,
            "start": {},
            "end": {"sm_mhz": 1755, "power_w": 512.5},
            "cpu_share_of_others": 0.25,
            "commit": "0123456789ab",
            "dirty": True,
            "packages": {"torch": "2.11.0", "timm": "1.0.31"},
        },
        "comparisons": [
            {
                "name": "batch 256",
                "unit": "img",
                "work": 256,
                "baseline": "kd (timm)",
                "rows": rows,
            },
            {
                "name": "matrix product",
                "unit": "product",
                "work": 1,
                "baseline": "8192",
                "rows": gemm,
            },
        ],
    }


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    text = gpu_report.markdown(record(), path, "stages.json")
    assert (
        "NVIDIA H200, driver 580.1, 1755 MHz and 512 W at the end; torch 2.11.0, timm 1.0.31; commit 012345678 with uncommitted"
        in text
    )
    assert (
        "| dad | 2 | 1.50–2.50 |".replace("1.50–2.50", "1.5–2.5") in text
        and "| 75% |" in text
        and "| 1024 |" in text
        and "5.20" in text
    )
    on_cpu = gpu_report.markdown(record("cpu"), path, "stages.json")
    assert (
        "Some CPU, threads: 2" in on_cpu
        and "took 25%" in on_cpu
        and "TFLOP" not in on_cpu
        and "3,280" not in on_cpu
    )


def test_documents_are_renewed_from_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages.json").write_text(json.dumps(record()))
    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- records: stages.json -->\nold\n<!-- end records -->\nafter\n")
    assert gpu_report.main(["--update", str(document), "--check"]) == 1
    assert gpu_report.main(["--update", str(document)]) == 0
    text = document.read_text()
    assert (
        text.startswith("before\n<!-- records")
        and text.endswith("<!-- end records -->\nafter\n")
        and "old" not in text
        and "| dad |" in text
    )
    assert gpu_report.main(["--update", str(document), "--check"]) == 0
    (tmp_path / "stages.json").write_text("{}")
    capsys.readouterr()
    assert (
        gpu_report.main(["--update", str(document)]) == 1
        and capsys.readouterr().err.count("\n") == 1
    )
    assert document.read_text() == text


def test_committed_tables_match_committed_records() -> None:
    """Numbers in documents come from records."""
    documents = [
        path for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md") if path.exists()
    ]
    for document in documents:
        text = document.read_text(encoding="utf-8")
        assert gpu_report.renewed(text, document) == text, (
            f"run scripts/gpu_report.py --update {document.name}"
        )


def test_committed_records_hold_no_paths() -> None:
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert not re.search(
            r'"(/|[A-Z]:\\)|/(home|root|tmp|work)/', path.read_text(encoding="utf-8")
        ), path
